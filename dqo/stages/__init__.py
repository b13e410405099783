"""The stages of a run: prepare, sft, rl, evaluate, register. Each is one function that a component calls.

A stage reads and writes directories; `docs/development.md` lists their files. It is idempotent and resumable: what it
read is digested into its key, its work lives in the workspace under that key, and a second call with the same inputs
returns the finished output or continues from the newest complete checkpoint.
"""
