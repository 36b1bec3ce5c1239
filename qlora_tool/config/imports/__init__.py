"""Configurations of other tools (PEFT, Axolotl, Unsloth, LLaMA-Factory) turned into ours.

A table a tool says what becomes of each of its keys; what no table has, or has no counterpart, is listed and never
dropped in silence. Programs are parsed, never run.
"""
