"""`python -m qlora_tool`."""

from qlora_tool.cli import main

if __name__ == "__main__":
    main()
