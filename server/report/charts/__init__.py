"""Charts, tables and markup of reports and of the observer's page."""
