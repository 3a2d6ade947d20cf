"""Images from one place and format to another: import, export, merge, split; and the facts about a folder, ``stats``."""
