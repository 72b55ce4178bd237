package fault

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/proto/status"
)

// child starts a process that only waits, with its pid file, and kills it at
// the test's end.
func child(t *testing.T, p Processes, name string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sleep", "600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if cmd.ProcessState != nil {
			return
		}
		if err := cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Error(err)
		}
		_ = cmd.Wait() // killed, or reaped by the test: an error either way
	})
	pid(t, p, name, fmt.Sprintln(cmd.Process.Pid))
	return cmd
}

func pid(t *testing.T, p Processes, name, text string) {
	t.Helper()
	if err := os.WriteFile(p.file(name, "pid"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func processes(t *testing.T) Processes {
	t.Helper()
	p := Processes{Dir: t.TempDir()}
	if err := os.Mkdir(filepath.Join(p.Dir, "run"), 0o755); err != nil {
		t.Fatal(err)
	}
	return p
}

func TestKillWaitsForTheEnd(t *testing.T) {
	p := processes(t)
	cmd := child(t, p, "host-1")
	if err := p.Kill("host-1"); err != nil {
		t.Fatal(err)
	}
	var ws unix.WaitStatus // WNOHANG: it must be over already
	if got, err := unix.Wait4(cmd.Process.Pid, &ws, unix.WNOHANG, nil); err != nil || got != cmd.Process.Pid || ws.Signal() != unix.SIGKILL {
		t.Fatalf("wait gives %d, %v, %v", got, ws, err)
	}
	if err := p.Kill("host-1"); !errors.Is(err, status.NotFound) {
		t.Fatalf("killed again: %v", err)
	}
}

func TestPauseStopsAndGoesOn(t *testing.T) {
	p := processes(t)
	cmd := child(t, p, "host-1")
	done := make(chan error, 1)
	go func() { done <- p.Pause("host-1", 50*time.Millisecond) }()
	var ws unix.WaitStatus
	if _, err := unix.Wait4(cmd.Process.Pid, &ws, unix.WUNTRACED, nil); err != nil || !ws.Stopped() {
		t.Fatalf("%v, %v", ws, err)
	}
	if _, err := unix.Wait4(cmd.Process.Pid, &ws, unix.WCONTINUED, nil); err != nil || !ws.Continued() {
		t.Fatalf("%v, %v", ws, err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestAPausedProcessCanBeKilled(t *testing.T) {
	p := processes(t)
	cmd := child(t, p, "host-1")
	done := make(chan error, 1)
	go func() { done <- p.Pause("host-1", maxFor) }()
	var ws unix.WaitStatus
	if _, err := unix.Wait4(cmd.Process.Pid, &ws, unix.WUNTRACED, nil); err != nil || !ws.Stopped() {
		t.Fatalf("%v, %v", ws, err)
	}
	if err := p.Kill("host-1"); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Fatal("it ended well")
	}
	if err := <-done; err != nil { // at once, not after ten minutes
		t.Fatal(err)
	}
}

// The number in an old pid file may be somebody else's by now: nothing is
// killed then.
func TestStrangersAreSpared(t *testing.T) {
	p := processes(t)
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	if sleep, err = filepath.EvalSymlinks(sleep); err != nil {
		t.Fatal(err)
	}
	cmd := child(t, p, "host-1")
	for name, spoil := range map[string]func(){
		"younger than the file": func() {
			old := time.Now().Add(-time.Hour)
			if err := os.Chtimes(p.file("host-1", "pid"), old, old); err != nil {
				t.Fatal(err)
			}
		},
		"another program": func() { p.Exe = "/usr/bin/cairn" },
		"no such process": func() { pid(t, p, "host-1", "4194304999") },
		"a free number":   func() { pid(t, p, "host-1", "4194303") },
		"half written":    func() { pid(t, p, "host-1", "") },
		"everybody":       func() { pid(t, p, "host-1", "-1") },
		"init":            func() { pid(t, p, "host-1", "1") },
		"no file": func() {
			if err := os.Remove(p.file("host-1", "pid")); err != nil {
				t.Fatal(err)
			}
		},
	} {
		spoil()
		if err := p.Kill("host-1"); !errors.Is(err, status.NotFound) {
			t.Errorf("%s: kill gives %v", name, err)
		}
		if err := p.Pause("host-1", time.Second); !errors.Is(err, status.NotFound) {
			t.Errorf("%s: pause gives %v", name, err)
		}
		p.Exe = ""
		pid(t, p, "host-1", fmt.Sprintln(cmd.Process.Pid))
	}
	p.Exe = sleep
	if err := p.Kill("host-1"); err != nil { // it lived through all that, and is the right one
		t.Fatal(err)
	}
}

func TestNamesAndHoldFiles(t *testing.T) {
	p := processes(t)
	for _, f := range []string{"host-2.pid", "host-1.pid", "meta-1.pid", "host-1.hold", "host.pid", "up.pid", "host-1.pid.tmp"} {
		if err := os.WriteFile(filepath.Join(p.Dir, "run", f), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got := p.Names(KindHost); !reflect.DeepEqual(got, []string{"host-1", "host-2"}) {
		t.Errorf("hosts %v", got)
	}
	if got := p.Names(KindMeta); !reflect.DeepEqual(got, []string{"meta-1"}) {
		t.Errorf("metas %v", got)
	}
	if got := (Processes{Dir: filepath.Join(p.Dir, "nowhere")}).Names(KindHost); got != nil {
		t.Errorf("no cluster has %v", got)
	}
	if err := p.Hold("host-2"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(p.Dir, "run", "host-2.hold")); err != nil {
		t.Error(err)
	}
	for range 2 { // releasing twice is fine
		if err := p.Release("host-2"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(filepath.Join(p.Dir, "run", "host-2.hold")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the hold file: %v", err)
	}
	if _, err := p.MetaLeader(); !errors.Is(err, status.Unsupported) {
		t.Errorf("leader: %v", err)
	}
}
