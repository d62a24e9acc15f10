"""The user's Python files: loading them, and errors that say where their code failed."""

from textpolicy.user_code.faults import (
    describe_error,
    describe_value,
    is_ctrl_c,
    raise_user_errors_as,
    type_name,
)
from textpolicy.user_code.load_file import (
    SCRIPT_MODULE,
    files_named_in,
    has_file_module_name,
    load_beside_run,
    load_python_file,
    provide_files,
    split_file_and_name,
)
from textpolicy.user_code.process_state import keep_process_state, keep_working_directory
from textpolicy.user_code.waiting_calls import WaitingCalls

__all__ = [
    "SCRIPT_MODULE",
    "WaitingCalls",
    "describe_error",
    "describe_value",
    "files_named_in",
    "has_file_module_name",
    "is_ctrl_c",
    "keep_process_state",
    "keep_working_directory",
    "load_beside_run",
    "load_python_file",
    "provide_files",
    "raise_user_errors_as",
    "split_file_and_name",
    "type_name",
]
