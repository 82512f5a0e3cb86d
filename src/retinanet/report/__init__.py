"""Pictures and self-contained pages about a run. Takes plain records, so that it knows no other room."""
