"""Charts, tables and markup that reports and the observer's page are built from."""
