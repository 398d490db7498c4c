"""Pack the code of the record into the text of one program, which all seeds share.

Reads:  params.yaml; the code of fairway/
Writes: artifacts/pack/program.py; requirements.txt: the packages that the program imports, with their versions; and
        source/: the files that it is packed from, as they are, and its settings
Method: modules are linked, what nothing reaches is dropped, and the rest is minified (packing/bundle.py)
Source: PR #1172 and #1493 ship one packed script. Ours: it is the code that the stages run, not a second script.
"""

from pathlib import Path

from fairway.packing.bundle import RECORD, make_program, requirements
from fairway.packing.readable import write_source
from fairway.params import load_params
from fairway.runtime.errors import no_arguments, run_stage
from fairway.runtime.files import output_folder, write_atomic
from fairway.whole_record import chosen_options, shipped_arguments


def main() -> None:
    """Pack the record of params.yaml into artifacts/pack."""
    no_arguments("pack")
    params = load_params("params.yaml")
    arguments = shipped_arguments(params)
    program = make_program(Path(), RECORD, arguments, late=["seed"], chosen=chosen_options(params))
    artifact, _, evaluator = arguments
    settings = artifact.model_dump() | {params.compress.evaluator: evaluator.model_dump()}
    with output_folder(Path("artifacts/pack")) as out:
        write_atomic(out / "program.py", program.text)
        write_atomic(out / "requirements.txt", requirements(program.text))
        write_source(out / "source", Path(), program.modules, settings)
    print(f"artifacts/pack/program.py: {len(program.text.encode()):,} bytes before compression")


if __name__ == "__main__":
    run_stage(main)
