"""Tables of runs: a YAML file says which, `python script/reproduce_table.py` trains them and writes what came out.

spec: the file. cells: one run of main.py each, and what it left. plan: checks them, and estimates what they cost.
runner, slurm: run them. statistics, numbers: means, and differences that are paired by seed. writing, figure: what
people read. record: the evidence that is kept. options, command: the command line, and what it does.
"""

# main.py's flags that a run gets from its place in the table.
OWN_FLAGS = ("config", "seed", "output_dir", "resume", "data_path", "eval", "check_data", "teacher_eval")
HELP = ("-h", "--help", "--list-regularizers", "--list_regularizers")  # which answer, and run nothing
