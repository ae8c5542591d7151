"""Tables of runs: a YAML file says which, `python script/reproduce_table.py` trains them and writes what came out.

spec, reading: the file. programs, trials: main.py and segmentation, and what each would build. cells: one run
each. backbones: the runs that those of segmentation start on. evidence: what a run leaves. plan: checks all, and
estimates. runner, slots, slurm: run them. statistics, numbers: means, and differences that are paired by seed.
writing, figure: what people read. record: the evidence that is kept. options, command: the command line.
"""

# Flags of a program that a run gets from its place in the table.
OWN_FLAGS = ("config", "seed", "output_dir", "resume", "data_path", "eval", "check_data", "teacher_eval")
HELP = ("-h", "--help", "--list-regularizers", "--list_regularizers")  # which answer, and run nothing
