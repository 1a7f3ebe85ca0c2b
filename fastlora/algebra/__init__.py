"""Adding and shrinking low-rank updates: functions of tensors, which know no layers."""
