"""A file a room of core/, and end-to-end ones. As a package, so that pytest finds core/ from the project's root."""
