"""Pack the code of the record into the text of one program, which all seeds share.

Reads:  params.yaml; the code of fairway/
Writes: artifacts/pack/program.py, and requirements.txt: the packages that the program imports, with their versions
Method: modules linked, what nothing reaches dropped, the rest minified (packing/bundle.py)
Source: PR #1172 and #1493 ship one packed script. Ours: the same code as the stages run, not a script beside it.
"""

from pathlib import Path

from fairway.packing.bundle import RECORD, program_text, requirements
from fairway.params import load_params
from fairway.runtime.errors import run_stage
from fairway.runtime.files import output_folder, write_atomic
from fairway.whole_record import chosen_options, shipped_arguments


def main() -> None:
    """Write artifacts/pack."""
    params = load_params("params.yaml")
    text = program_text(Path(), RECORD, shipped_arguments(params), late=["seed"], chosen=chosen_options(params))
    with output_folder(Path("artifacts/pack")) as out:
        write_atomic(out / "program.py", text)
        write_atomic(out / "requirements.txt", requirements(text))
    print(f"artifacts/pack/program.py: {len(text.encode()):,} bytes before compression")


if __name__ == "__main__":
    run_stage(main)
