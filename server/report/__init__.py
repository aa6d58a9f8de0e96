"""Reports of a run for people: summaries, charts and sections, as HTML without scripts and as Markdown.

The page of `fedbasin observe` and the file of `fedbasin report` are made of the same sections.
"""
