"""The catalogue of bad inputs: sixty numbers, and where each is held.

Expected of all: an error with a stable code in JSON, no stack trace, no row, no file, and a service that lives on.
A status is the API's own: a bad parameter is 400 with `param`, 422 is for an Idempotency-Key used again for something
else. A test that is parametrised over several numbers has the number first in its ids: `-k 07-` runs number 7.
"""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

REQUESTS = "api/test_bad_inputs_requests.py"
DATA = "api/test_bad_inputs_data.py"
MODELS = "api/test_bad_inputs_models.py"
SERVERS = "api/test_bad_inputs_servers.py"
MESSAGES = "worker/test_bad_messages.py"
STRICT = "api/test_strict_input.py"
AUTH = "api/test_auth.py"
ONCE = "api/test_idempotency.py"
HOSTILE = "worker/lora/test_hostile_files.py"
FORMAT = "worker/lora/test_format.py"
UP = "system/test_up.py"

CATALOGUE: dict[int, tuple[str, list[str]]] = {
    1: ("empty body", [f"{REQUESTS}::test_malformed"]),
    2: ("body that is not JSON", [f"{REQUESTS}::test_malformed", f"{STRICT}::test_what_is_not_a_json_object_is_400"]),
    3: ("another content type", [f"{REQUESTS}::test_malformed", f"{STRICT}::test_another_content_type_is_415"]),
    4: ("a byte over the limit", [f"{REQUESTS}::test_malformed", f"{STRICT}::test_a_body_above_the_limit_is_413",
        f"{SERVERS}::test_row_4_a_byte_too_many_is_heard_by_a_client_that_sends_first"]),
    5: ("an endless chunked body", [f"{STRICT}::test_an_endless_chunked_body_is_413",
        f"{SERVERS}::test_row_5_an_endless_body_is_cut_at_the_limit"]),
    6: ("JSON nested 100,000 deep", [f"{REQUESTS}::test_malformed"]),
    7: ("NaN, Infinity, 1e999", [f"{REQUESTS}::test_malformed"]),
    8: ("duplicate keys", [f"{REQUESTS}::test_malformed"]),
    9: ("an integer of 5,000 digits", [f"{REQUESTS}::test_malformed"]),
    10: ("true for a number", [f"{REQUESTS}::test_wrong_jobs"]),
    11: ("text for a number", [f"{REQUESTS}::test_wrong_jobs"]),
    12: ("unknown fields", [f"{REQUESTS}::test_wrong_jobs", f"{STRICT}::test_a_bad_job_parameter_is_400_and_named"]),
    13: ("rank", [f"{REQUESTS}::test_wrong_jobs"]),
    14: ("learning rate", [f"{REQUESTS}::test_wrong_jobs"]),
    15: ("a billion epochs", [f"{REQUESTS}::test_wrong_jobs"]),
    16: ("a sequence above the model's", [f"{REQUESTS}::test_row_16_the_model_s_limit_is_told"]),
    17: ("a path for a name", [f"{REQUESTS}::test_bad_names"]),
    18: ("an encoded path for a name", [f"{REQUESTS}::test_bad_names", f"{REQUESTS}::test_what_names_nothing_is_404"]),
    19: ("names of other characters", [f"{REQUESTS}::test_bad_names", f"{STRICT}::test_a_bad_adapter_name_is_400"]),
    20: ("a name that exists: the next version", [f"{REQUESTS}::test_bad_names",
        "shared/test_store_adapters.py::test_version_numbers_grow_through_deletion"]),
    21: ("ids of other spellings", [f"{REQUESTS}::test_what_names_nothing_is_404",
        f"{STRICT}::test_what_is_not_there_is_404"]),
    22: ("another tenant's objects", [f"{AUTH}::test_another_tenant_s_objects_are_missing",
        f"{AUTH}::test_another_tenant_s_file_cannot_be_trained_on"]),
    23: ("no key, another scheme, a key in the URL", [f"{AUTH}::test_what_is_no_key_is_401",
        f"{AUTH}::test_a_key_in_the_url_is_not_taken", "api/test_declarations.py::"
        "test_every_route_but_two_refuses_a_stranger"]),
    24: ("wrong, revoked and expired keys", [f"{AUTH}::test_a_wrong_secret_and_a_revoked_key_are_401",
        "shared/test_keys.py::test_wrong_keys_are_refused_alike",
        "shared/test_keys.py::test_a_key_lives_until_it_expires"]),
    25: ("a key without the scope", [f"{AUTH}::test_a_scope_that_is_missing_is_403_and_named"]),
    26: ("a foreign Host", [f"{REQUESTS}::test_foreign_pages_are_not_served_without_keys",
        f"{AUTH}::test_a_foreign_host_is_refused_without_keys"]),
    27: ("a foreign Origin", [f"{REQUESTS}::test_foreign_pages_are_not_served_without_keys",
        f"{AUTH}::test_a_foreign_page_is_refused_without_keys"]),
    28: ("one Idempotency-Key fifty times", [f"{ONCE}::test_many_at_once_are_one_job"]),
    29: ("an Idempotency-Key for another body", [f"{ONCE}::test_another_job_with_the_key_is_refused",
        f"{ONCE}::test_another_file_with_the_key_is_refused"]),
    30: ("an empty data set", [f"{DATA}::test_a_bad_data_set_is_told_its_line_and_makes_no_job"]),
    31: ("a line of 200 MB", [f"{SERVERS}::test_row_31_a_line_of_200_mb_takes_no_memory",
        f"{DATA}::test_a_bad_data_set_is_told_its_line_and_makes_no_job"]),
    32: ("bad JSON on line 7", [f"{DATA}::test_a_bad_data_set_is_told_its_line_and_makes_no_job"]),
    33: ("encodings", [f"{DATA}::test_a_bad_data_set_is_told_its_line_and_makes_no_job",
        f"{DATA}::test_what_only_looks_bad_is_accepted"]),
    34: ("no sample within the length", ["worker/training/test_dataset.py::test_nothing_to_learn",
        "api/test_inspection.py::test_nothing_to_learn_is_a_bad_file"]),
    35: ("no role, no reply", [f"{DATA}::test_a_bad_data_set_is_told_its_line_and_makes_no_job",
        "shared/test_data_format.py::test_bad_line_is_named"]),
    36: ("special tokens as text", [f"{DATA}::test_what_only_looks_bad_is_accepted",
        "worker/training/test_dataset_formats.py::test_special_tokens_in_contents_are_plain_text",
        "worker/test_encoding.py::test_special_tokens_in_contents_are_plain_text"]),
    37: ("a gzip bomb", [f"{DATA}::test_a_bad_data_set_is_told_its_line_and_makes_no_job",
        "shared/test_data_format_gzip.py::test_bomb_is_refused_in_bounded_memory"]),
    38: ("URLs for data sets", [f"{DATA}::test_row_38_no_url_is_a_data_set"]),
    39: ("base models", [f"{MODELS}::test_row_39_a_base_model_is_one_of_the_registered",
        "worker/test_importer.py::test_code_is_refused",
        "worker/test_base_model_refusals.py::test_remote_code_is_refused"]),
    40: ("no safetensors", [f"{MODELS}::test_row_40_no_adapter_is_uploaded",
        f"{HOSTILE}::test_what_is_not_safetensors_is_refused"]),
    41: ("broken safetensors", [f"{HOSTILE}::test_what_is_not_safetensors_is_refused"]),
    42: ("safetensors that a library accepts", [f"{HOSTILE}::"
        "test_what_the_library_accepts_but_no_adapter_has_is_refused",
        f"{HOSTILE}::test_too_many_tensors_are_refused"]),
    43: ("weights that are not finite", [f"{HOSTILE}::test_what_the_library_accepts_but_no_adapter_has_is_refused"]),
    44: ("shapes of another model", [f"{FORMAT}::test_every_mismatch_is_in_one_error",
        f"{FORMAT}::test_an_adapter_of_another_base_is_refused",
        f"{HOSTILE}::test_what_the_library_accepts_but_no_adapter_has_is_refused"]),
    45: ("hostile adapter configs", [f"{HOSTILE}::test_no_module_is_imported_on_a_files_word",
        f"{FORMAT}::test_what_we_do_not_compute_is_refused_by_name"]),
    46: ("large and double adapter configs", [f"{HOSTILE}::test_a_hostile_config_is_refused",
        f"{FORMAT}::test_the_rank_must_be_the_configs"]),
    47: ("adapters that are not there", [f"{MODELS}::test_wrong_generations",
        f"{MODELS}::test_row_47_a_deleted_adapter_is_not_found",
        "api/test_completions.py::test_a_corrupt_version_does_not_generate"]),
    48: ("generation parameters", [f"{MODELS}::test_wrong_generations",
        "api/test_completion_parameters.py::test_a_bad_parameter_is_400_and_named"]),
    49: ("a prompt above the context", [f"{MODELS}::test_row_49_a_prompt_beyond_the_context_is_told_the_counts"]),
    50: ("a client that disconnects", ["api/test_hangups.py::test_a_client_that_hangs_up_cancels_at_once",
        "worker/test_desk.py::test_a_running_answer_is_cancelled_within_two_steps"]),
    51: ("cancelling what has ended", [f"{MODELS}::test_row_51_a_job_ends_once",
        f"{AUTH}::test_another_tenant_s_objects_are_missing"]),
    52: ("deleting twice", [f"{MODELS}::test_row_52_an_adapter_is_deleted_once"]),
    53: ("pages and cursors", [f"{MODELS}::test_wrong_questions",
        "shared/test_jobs_queries.py::test_cursors_belong_to_their_list"]),
    54: ("heads and smuggled requests", [f"{SERVERS}::test_a_bad_head_is_refused_and_nothing_behind_it_is_read"]),
    55: ("methods", [f"{MODELS}::test_wrong_questions",
        f"{STRICT}::test_a_method_that_is_not_allowed_is_405_in_json"]),
    56: ("clients that dawdle", [f"{SERVERS}::test_row_56_clients_that_dawdle_are_cut_off_and_hold_up_nobody",
        f"{SERVERS}::test_a_refusal_holds_no_thread_though_the_client_stays"]),
    57: ("forged messages", [f"{MESSAGES}::test_a_forged_message_is_discarded",
        f"{MESSAGES}::test_a_pickle_is_not_loaded", f"{MESSAGES}::test_nobody_can_command_a_worker"]),
    58: ("an edited row", ["shared/test_jobs_arcs.py::test_edited_spec_fails_the_job"]),
    59: ("a symbolic link in the store", ["api/test_adapters.py::test_a_symbolic_link_is_not_followed",
        "shared/test_store_durable.py::test_links_are_not_published"]),
    60: ("settings", [f"{UP}::test_a_port_in_use_is_refused",
        f"{UP}::test_a_directory_that_cannot_be_written_is_refused",
        f"{UP}::test_a_schema_newer_than_the_code_is_refused_and_untouched",
        f"{UP}::test_an_open_host_without_a_key_is_refused"]),
}  # fmt: skip


def test_the_catalogue_is_whole() -> None:
    """Sixty numbers, in order."""
    assert list(CATALOGUE) == list(range(1, 61))


@pytest.mark.parametrize("number", CATALOGUE, ids=lambda number: f"{number:02}-{CATALOGUE[number][0]}")
def test_the_number_is_held(number: int) -> None:
    """Each test that the catalogue names is there."""
    for name in CATALOGUE[number][1]:
        path, _, function = name.partition("::")
        text = (TESTS / path).read_text(encoding="utf-8")
        assert re.search(rf"^def {function}\(", text, re.MULTILINE), name
