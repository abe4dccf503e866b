"""One HTML file that shows a lowbit model: what it is, where its bytes are, and where it differs from the original.

:mod:`.facts` collects numbers, :mod:`.figures` makes plots of them, :mod:`.page` puts all into a page.
"""
