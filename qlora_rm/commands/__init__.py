"""The commands: parse, call, print. Each command imports the libraries it needs itself, so that help is instant."""
