"""The system calls that a box allows, as a program for the kernel (seccomp).

The namespaces of a box leave some ways open: keys of the session, sockets to the host of a virtual
machine, shared memory that no limit counts, and namespaces of its own in which a process is root.
The filter closes these and everything else that reaches deep into the kernel.
"""

import struct

from textpolicy.errors import ConfigError

_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_LOAD, _EQUAL, _GREATER, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x25, 0x35, 0x45, 0x54, 6
_NUMBER_AT, _MACHINE_AT, _ARGUMENTS_AT = 0, 4, 16
_NEWEST_CALL = 456
"""Calls that are newer than this list do not exist in a box."""
_NEW_NAMESPACES = 0x7E020000
_UNIX, _STREAM = 1, 1

# The number of each call on x86_64 and on aarch64, or None where there is no such call.
_DENIED: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "kcmp": (312, 272),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "unshare": (272, 97),
    "setns": (308, 268),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "personality": (135, 92),
    "vhangup": (153, 58),
    # The devices of a box are those of the machine, and their times would change.
    "utimensat": (280, 88),
    "futimesat": (261, None),
    "utimes": (235, None),
    "utime": (132, None),
    # The files of a box are those of the machine: a lock would make its programs wait, and a watch
    # would tell which files they open.
    "flock": (73, 32),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    # Each writes out what all programs of the machine have written.
    "sync": (162, 81),
    "syncfs": (306, 267),
    "iopl": (172, None),
    "ioperm": (173, None),
    "modify_ldt": (154, None),
    "uselib": (134, None),
    "fanotify_init": (300, 262),
    "mbind": (237, 235),
    "set_mempolicy": (238, 237),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
}
_MACHINES = {
    # The number of the machine, the column above, clone, socketpair and fcntl.
    "x86_64": (0xC000003E, 0, 56, 53, 72),
    "aarch64": (0xC00000B7, 1, 220, 199, 25),
}
_CLONE3 = 435


def system_call_filter(machine: str) -> bytes:
    """Return the filter for `platform.machine()`, as bubblewrap takes it."""
    if machine not in _MACHINES:
        raise ConfigError(
            f"running model-written code needs a filter of system calls, and none is written for "
            f"this processor ({machine}); run on {' or '.join(_MACHINES)}, or pass unsafe=True to "
            "run the code as a plain process that can delete your files"
        )
    audit_number, column, clone, socketpair, fcntl = _MACHINES[machine]
    lines = [
        (_LOAD, 0, 0, _MACHINE_AT),
        (_EQUAL, 1, 0, audit_number),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_GREATER, 0, 1, _NEWEST_CALL),
        (_RETURN, 0, 0, _ERRNO | _ENOSYS),
        # The flags of clone3 are in memory, which a filter cannot read. The C library uses clone.
        (_EQUAL, 0, 1, _CLONE3),
        (_RETURN, 0, 0, _ERRNO | _ENOSYS),
    ]
    for numbers in _DENIED.values():
        number = numbers[column]
        if number is not None:
            lines += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    lines += [
        (_EQUAL, 0, 4, clone),
        (_LOAD, 0, 0, _ARGUMENTS_AT),
        (_ANY_BIT, 0, 1, _NEW_NAMESPACES),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
        (_RETURN, 0, 0, _ALLOW),
        # The commands of fcntl that lock: F_SETLK, F_SETLKW, and the two of open files.
        (_EQUAL, 0, 7, fcntl),
        (_LOAD, 0, 0, _ARGUMENTS_AT + 8),
        (_EQUAL, 4, 0, 6),
        (_EQUAL, 3, 0, 7),
        (_EQUAL, 2, 0, 37),
        (_EQUAL, 1, 0, 38),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
        # A pair of connected sockets is what asyncio wakes itself with.
        (_EQUAL, 0, 7, socketpair),
        (_LOAD, 0, 0, _ARGUMENTS_AT),
        (_EQUAL, 0, 4, _UNIX),
        (_LOAD, 0, 0, _ARGUMENTS_AT + 8),
        (_AND, 0, 0, 0xF),
        (_EQUAL, 0, 1, _STREAM),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("HBBI", *line) for line in lines)
