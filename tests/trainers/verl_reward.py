"""verl's ``reward.custom_reward_function``, for its reward loop's process."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):
    return float(f"\\boxed{{{ground_truth}}}" in solution_str)
