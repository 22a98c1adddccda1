"""Mistakes in what a run does when it is signalled, and when one of its processes is lost."""

from tests.mutations import Mistake

COPIES = "test_launch_lifetime.py::test_a_second_ctrl_c_ends_at_once_and_copies_do_not"
WATCHDOG = "test_launch_watchdog.py::"

MISTAKES = {
    "copies_of_ctrl_c_end_at_once": Mistake(
        "launch/runtime/lifetime.py",
        "again = now - since > COPY_SECONDS",
        "again = now > since",
        COPIES,
    ),
    "left_before_the_main_process_has_spoken": Mistake(
        "launch/__main__.py",
        "if mute or status == exit_status.LOST_PEER:",
        "if status == exit_status.LOST_PEER:",
        "test_launch_run_lock.py::test_every_process_of_a_refused_run_ends_and_the_main_one_says_why",
    ),
    "cause_that_another_noticed_first_is_lost": Mistake(
        "launch/runtime/watchdog/others.py",
        "self._heard or why",
        "why",
        WATCHDOG + "test_the_lowest_rank_says_the_cause_that_another_noticed_first",
    ),
    "any_second_signal_ends_at_once": Mistake(
        "launch/runtime/lifetime.py",
        "if again if number == signal.SIGINT else self._at_once:",
        "if again:",
        COPIES,
    ),
    "an_interrupt_is_left_to_the_main_thread": Mistake(
        "launch/__main__.py",
        "numbers = STOP_SIGNALS if interrupts else",
        "numbers =",
        "test_launch_lifetime.py::test_a_second_ctrl_c_ends_a_program_that_trains_nothing",
    ),
    "a_rollback_takes_the_place_of_a_stop": Mistake(
        "launch/training/trainer.py",
        "going_on=not stopped_by",
        "going_on=True",
        "test_launch_signals.py::test_a_signal_is_not_lost_in_a_rollback",
    ),
    "ctrl_c_asks_to_be_started_again": Mistake(
        "launch/runtime/exit_status.py",
        "return INTERRUPTED if number == signal.SIGINT else STOPPED",
        "return STOPPED",
        "test_launch_signals.py::test_ctrl_c_and_a_signal_before_the_first_step",
    ),
    "sigterm_before_ctrl_c": Mistake(
        "launch/runtime/lifetime.py",
        "self.number = signal.NSIG - highest",
        "self.number = signal.SIGTERM",
        "test_launch_lifetime.py::test_processes_agree_on_the_signal_of_a_person_first",
    ),
    "a_stopped_process_counts_as_busy": Mistake(
        "launch/runtime/process_table.py",
        'return _stat(pid)[:1] == ["T"]',
        "return False",
        WATCHDOG + "test_a_stopped_process_is_named_and_killed",
    ),
    "silence_of_the_main_process_does_not_count": Mistake(
        "launch/runtime/watchdog/others.py",
        "self._main.quiet > self.settings.timeout",
        "False",
        WATCHDOG + "test_a_lost_main_watchdog_is_named_by_the_lowest_rank_that_answers",
    ),
    "every_process_speaks_for_a_lost_main_one": Mistake(
        "launch/runtime/watchdog/others.py",
        "self._speaks = not answers(lower, self.settings.token, self._why_lost)",
        "self._speaks = True",
        WATCHDOG + "test_a_lost_main_watchdog_is_named_by_the_lowest_rank_that_answers",
    ),
    "farewells_are_losses": Mistake(
        "launch/runtime/watchdog/main_process.py",
        "            self.forget(self._peers.pop(member.rank))\n",
        "",
        WATCHDOG + "test_processes_that_leave_in_order_are_not_lost",
    ),
    "every_claim_is_granted": Mistake(
        "launch/runtime/watchdog/main_process.py",
        'wire.send({"granted": rank == winner})',
        'wire.send({"granted": True})',
        WATCHDOG + "test_one_process_says_its_error_and_the_others_leave_with_its_status",
    ),
    "processes_that_do_not_leave_are_left_alone": Mistake(
        "launch/runtime/watchdog/base.py",
        "            self.own.kill_process()\n            self._done = True\n\n    def _accept",
        "            self._done = True\n\n    def _accept",
        WATCHDOG + "test_a_process_that_does_not_leave_is_killed",
    ),
    "processes_that_say_they_leave_are_trusted": Mistake(
        "launch/runtime/watchdog/base.py",
        "self._left, self._kill_at = True, time.monotonic() + LEFT_GRACE",
        "self._left = True",
        WATCHDOG + "test_a_process_that_says_it_leaves_and_does_not_is_killed",
    ),
    "what_comes_with_an_introduction_is_another_one": Mistake(
        "launch/runtime/watchdog/base.py",
        "        messages = wire.receive()\n        for message in messages or ():\n"
        "            if wire in self._handlers:",
        "        messages, handlers = wire.receive(), dict(self._handlers)\n        for message in messages or ():\n"
        "            if handlers[wire][0](message) and False:",
        WATCHDOG + "test_a_watchdog_may_introduce_itself_and_beat_in_one_breath",
    ),
    "a_suspended_machine_is_a_silent_one": Mistake(
        "launch/runtime/watchdog/base.py",
        "min(now - former, 4 * TICK, self.settings.timeout / 4), now",
        "now - former, now",
        WATCHDOG + "test_time_in_which_the_watchdog_did_not_run_is_no_silence",
    ),
    "processes_of_the_same_number_are_killed": Mistake(
        "launch/runtime/watchdog/member.py",
        "started is not None and process_table.started(pid) == started",
        "True",
        WATCHDOG + "test_only_the_same_process_is_killed",
    ),
    "every_run_may_connect": Mistake(
        "launch/runtime/watchdog/others.py",
        'if message.get("token") == self.settings.token:',
        "if True:",
        WATCHDOG + "test_a_lost_main_process_and_rank_1_leave_rank_2_to_speak",
    ),
}
