package main

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// Every thread of a process has coarse timers afterwards, later ones too.
func TestTimersAreCoarse(t *testing.T) {
	slack := func() map[string]string {
		got := map[string]string{}
		tasks, err := filepath.Glob("/proc/self/task/*")
		if err != nil {
			t.Fatal(err)
		}
		for _, task := range tasks {
			b, err := os.ReadFile(filepath.Join("/proc", filepath.Base(task), "timerslack_ns"))
			if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) { // it has ended
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
			got[filepath.Base(task)] = strings.TrimSpace(string(b))
		}
		return got
	}
	before := slack()
	t.Cleanup(func() {
		for task, ns := range before {
			if err := os.WriteFile(filepath.Join("/proc", task, "timerslack_ns"), []byte(ns), 0); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ESRCH) {
				t.Error(err)
			}
		}
	})
	if err := coarseTimers(); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	up, free := make(chan struct{}), make(chan struct{})
	for range 2 * len(before) { // each on a thread of its own
		wg.Go(func() {
			runtime.LockOSThread()
			up <- struct{}{}
			<-free
		})
	}
	for range 2 * len(before) {
		<-up
	}
	after := slack()
	close(free)
	wg.Wait()
	if len(after) <= len(before) {
		t.Errorf("%d threads before, %d now", len(before), len(after))
	}
	for task, ns := range after {
		if ns != timerSlack {
			t.Errorf("thread %s may wake %s ns late, not %s", task, ns, timerSlack)
		}
	}
}
