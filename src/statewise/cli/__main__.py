from statewise.cli import entry

entry()
