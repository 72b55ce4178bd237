package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// timerSlack is how much later than asked a thread of a metadata node may wake. Go's
// runtime has a thread that looks after the others: while anything runs it sleeps
// 20 µs, looks, and sleeps again. With the kernel's usual slack of 50 µs that was a
// fifth of all that nodes and their clients cost under a moderate load, on a machine
// where each wakeup is dear (docs/SCALE.md).
const timerSlack = "500000" // ns

// coarseTimers sets it for the threads there are, from which later ones have it.
// Programs that this one starts would have it too. The kernel allows it to root, or
// with CAP_SYS_NICE; without, all works as before.
func coarseTimers() error {
	set := map[string]bool{}
	for n := -1; len(set) > n; { // until nobody was started meanwhile by one that did not have it
		n = len(set)
		tasks, err := filepath.Glob("/proc/self/task/*")
		if err != nil {
			return err
		}
		for _, t := range tasks {
			// Not in self/task, where there is no such file.
			err := os.WriteFile(filepath.Join("/proc", filepath.Base(t), "timerslack_ns"), []byte(timerSlack), 0)
			if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) { // it has ended
				continue
			}
			if err != nil {
				return fmt.Errorf("timers stay as fine as they are: %w", err)
			}
			set[t] = true
		}
	}
	return nil
}
