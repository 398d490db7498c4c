"""Get the documents that everything is trained and scored on.

Reads:  what the section `fetch` of params.yaml names: pinned source distributions on PyPI, files of one's own, or a
        published export on the Hugging Face hub
Writes: data/docs/docs.jsonl (or .jsonl.zst): one JSON object with `text` a line, in the order that holds from here on;
        the first tokenize.val_documents lines validate. Of a published export: its shards and tokenizer, and hub.json
Source: the layout of the challenge's docs_selected.jsonl. The laptop's documents are Django's documentation.
"""

from pathlib import Path

from fairway.params import load_params
from fairway.preflight import check_machine
from fairway.runtime.errors import no_arguments, run_stage
from fairway.runtime.files import output_folder
from fairway.tokens.hub import fetch_hub
from fairway.tokens.own_text import FetchFile, fetch_own_text
from fairway.tokens.sdists import FetchSdists, fetch_sdists


def main() -> None:
    """Fetch what params.yaml names into data/docs, and print how much it is.

    A machine that cannot run the whole experiment is refused before anything is downloaded.
    """
    no_arguments("fetch")
    params = load_params("params.yaml")
    check_machine(params, fetched=False)
    fetch = params.fetch
    with output_folder(Path("data/docs")) as folder:
        if isinstance(fetch, FetchSdists):
            fetched = fetch_sdists(fetch.sdists, fetch.suffixes, folder)
            print(f"fetch: {fetched.documents} documents, {fetched.text_bytes / 1e6:.1f} MB of text")
            if fetched.skipped:
                print(f"fetch: left out {fetched.skipped} files that are blank or not UTF-8")
        elif isinstance(fetch, FetchFile):
            print(f"fetch: {fetch_own_text(fetch, folder)} documents of {', '.join(fetch.path)}")
        else:
            print(f"fetch: {len(fetch_hub(fetch, folder).files)} files of {fetch.variant}")


if __name__ == "__main__":
    run_stage(main)
