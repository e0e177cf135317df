"""The commands: parse, call, print. Libraries are imported by the command that needs them, so that help is instant."""
