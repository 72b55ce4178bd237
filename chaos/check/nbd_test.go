package check

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cairnstore/cairn/proto/status"
)

// serve starts an NBD server that others wrote and returns a function that
// kills it, waiting until it is gone.
func serve(t *testing.T, socket, name string, args ...string) (kill func()) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("%s is not installed: `make deps`", name)
	}
	cmd := exec.Command(name, args...)
	var said strings.Builder
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	gone := make(chan error, 1)
	go func() { gone <- cmd.Wait() }()
	killed := false
	kill = func() {
		if killed {
			return
		}
		killed = true
		if err := cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		<-gone // the error says it was killed
	}
	t.Cleanup(kill)
	for end := time.Now().Add(10 * time.Second); ; {
		c, err := net.Dial("unix", socket)
		if err == nil {
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			return kill
		}
		if time.Now().After(end) {
			t.Fatalf("%s does not serve: %v: %s", name, err, said.String())
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func checkLoad(t *testing.T, l *Load) {
	t.Helper()
	if _, err := l.ReadAll(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := linearizable(t, l); err != nil {
		t.Fatal(err)
	}
	for _, k := range l.Stats().Kinds {
		if k.Count == 0 {
			t.Errorf("no %s was answered", k.Kind)
		}
	}
}

func TestLoadOverNBDMemory(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	serve(t, socket, "nbdkit", "--foreground", "--unix", socket, "memory", "1M")
	l := NewLoad(Config{Dial: NBD("nbd+unix:///?socket="+socket, nil), Seed: 11, Blocks: testBlocks, Rate: 100_000, Ops: 5000})
	if err := l.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	checkLoad(t, l)
}

// A server killed and started again on the same file is ridden out.
func TestLoadOverNBDRestart(t *testing.T) {
	dir := t.TempDir()
	socket, raw := filepath.Join(dir, "s"), filepath.Join(dir, "raw")
	start := func() func() {
		return serve(t, socket, "nbdkit", "--foreground", "--unix", socket, "file", raw)
	}
	if err := os.WriteFile(raw, make([]byte, testBlocks*BlockBytes), 0o600); err != nil {
		t.Fatal(err)
	}
	kill := start()
	l := NewLoad(Config{Dial: NBD("nbd+unix:///?socket="+socket, nil), Seed: 12, Blocks: testBlocks, Rate: 4000})
	ctx, cancel := context.WithCancel(t.Context())
	ran := make(chan error, 1)
	go func() { ran <- l.Run(ctx) }()
	waitFor := func(ok func(LoadStats) bool) {
		for !ok(l.Stats()) {
			select {
			case err := <-ran:
				t.Fatalf("the load ended: %v", err)
			case <-time.After(5 * time.Millisecond):
			}
		}
	}
	reads := func(st LoadStats) int { return st.Kinds[read].Count }
	for range 3 {
		before := l.Stats()
		waitFor(func(st LoadStats) bool { return reads(st) > reads(before)+100 })
		kill()
		if err := os.Remove(socket); err != nil {
			t.Fatal(err)
		}
		waitFor(func(st LoadStats) bool { return st.Reconnects > before.Reconnects })
		kill = start()
	}
	before := l.Stats()
	waitFor(func(st LoadStats) bool { return reads(st) > reads(before)+300 })
	cancel()
	if err := <-ran; err != nil {
		t.Fatal(err)
	}
	checkLoad(t, l)
}

// An error answer fails the run; it is not taken for a lost connection.
func TestLoadOverNBDError(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	serve(t, socket, "nbdkit", "--foreground", "--unix", socket, "--filter=error", "memory", "1M", "error-rate=1%", "error=EIO")
	l := NewLoad(Config{Dial: NBD("nbd+unix:///?socket="+socket, nil), Seed: 13, Blocks: testBlocks, Rate: 100_000, Ops: 5000})
	if err := l.Run(t.Context()); !errors.Is(err, status.IO) || errors.Is(err, ErrDisconnected) {
		t.Fatalf("got %v, want the server's EIO", err)
	}
}
