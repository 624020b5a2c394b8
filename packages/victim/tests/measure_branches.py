"""Look at both sets of graphs and print the table: FOLDER RECORD.json."""

import sys
from pathlib import Path

import torch
from branch_graphs.measured import measure, table

if __name__ == "__main__":
    torch.set_num_threads(1)
    print("\n".join(table(measure(Path(sys.argv[1]), Path(sys.argv[2])))))
