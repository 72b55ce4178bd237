package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/vmhook/machine"
)

// exports is a gateway as the agent sees one: its volumes are real exports of
// one NBD server, and it remembers who has what.
type exports struct {
	dir  string
	sock string

	mu       sync.Mutex
	attached map[string]int // calls of Attach minus calls of Detach
	refuse   string         // this volume cannot be attached
	detach   error          // what Detach answers
}

func (x *exports) Attach(_ context.Context, name string) (string, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if name == x.refuse {
		return "", status.Errorf(status.Held, "volume %s is held by host-2", name)
	}
	x.attached[name]++
	return "nbd+unix:///" + name + "?socket=" + x.sock, nil
}

func (x *exports) Detach(_ context.Context, name string) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.attached[name]--
	return x.detach
}

func (x *exports) Expect(name, _ string, _ uint64) string {
	return "nbd+unix:///" + name + "?socket=" + x.sock
}

func (x *exports) TakeBack(ctx context.Context, name string) error {
	x.mu.Lock()
	had := x.attached[name] > 0
	x.mu.Unlock()
	if had {
		return nil
	}
	_, err := x.Attach(ctx, name)
	return err
}

func (x *exports) set(refuse string, detach error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.refuse, x.detach = refuse, detach
}

// held lists the volumes that are attached.
func (x *exports) held() string {
	x.mu.Lock()
	defer x.mu.Unlock()
	var out []string
	for name, n := range x.attached {
		if n != 0 {
			out = append(out, fmt.Sprintf("%s:%d", name, n))
		}
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

// newExports serves the files of a directory, one export per file.
func newExports(t *testing.T, names ...string) *exports {
	t.Helper()
	dir, err := os.MkdirTemp("", "vms")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	x := &exports{dir: dir, sock: filepath.Join(dir, "nbd.sock"), attached: map[string]int{}}
	if err := os.Mkdir(filepath.Join(dir, "disks"), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		x.size(t, name, 1<<20)
	}
	cmd := exec.Command("nbdkit", "--foreground", "--exit-with-parent", "--unix", x.sock, "--pidfile", x.sock+".pid", "file", "dir="+filepath.Join(dir, "disks"))
	if err := cmd.Start(); err != nil {
		t.Fatalf("nbdkit: %v (apt-get install nbdkit)", err)
	}
	t.Cleanup(func() {
		if err := cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		var exit *exec.ExitError
		if err := cmd.Wait(); err != nil && !errors.As(err, &exit) {
			t.Error(err)
		}
	})
	await(t, "nbdkit accepts", func() bool {
		text, err := os.ReadFile(x.sock + ".pid") // written once it does
		return err == nil && strings.HasSuffix(string(text), "\n")
	})
	return x
}

func (x *exports) size(t *testing.T, name string, sizeBytes int64) {
	t.Helper()
	file := filepath.Join(x.dir, "disks", name)
	f, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(sizeBytes), f.Close()); err != nil {
		t.Fatal(err)
	}
}

// await polls for a state of another process.
func await(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("never: %s", what)
		}
	}
}

// fixture is an agent whose machines are real QEMUs without a guest.
type fixture struct {
	*Agent
	x     *exports
	exits chan string
}

func newFixture(t *testing.T, x *exports) *fixture {
	t.Helper()
	f := &fixture{x: x, exits: make(chan string, 64)}
	f.Agent = New(Config{
		Dir: filepath.Join(x.dir, "vm"), Volumes: x,
		Accel:  machine.Accel{Name: "tcg", Why: "the test says so"},
		OnExit: func(vm, why string) { f.exits <- vm + ": " + why },
	})
	t.Cleanup(func() {
		if err := f.StopAll(context.Background(), true); err != nil && !errors.Is(err, status.Shutdown) {
			t.Error(err)
		}
		f.Close()
	})
	return f
}

func vmOf(name string, volumes ...string) *pb.VM {
	v := &pb.VM{Name: name, Cpus: 1, MemoryBytes: 32 << 20, Desired: "paused", Volume: volumes[0], Disks: volumes[1:]}
	return v
}

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestOneMachine(t *testing.T) {
	ctx := testContext(t)
	f := newFixture(t, newExports(t, "a", "b"))
	if err := f.Start(ctx, vmOf("vm-1", "a", "b")); err != nil {
		t.Fatal(err)
	}
	if got := f.x.held(); got != "a:1 b:1" {
		t.Errorf("attached: %s", got)
	}
	for what, c := range map[string]struct {
		vm   *pb.VM
		kind status.Kind
	}{
		"the same VM again":   {vmOf("vm-1", "c"), status.Exists},
		"a volume in use":     {vmOf("vm-2", "c", "b"), status.Held},
		"a volume twice":      {vmOf("vm-2", "c", "c"), status.Invalid},
		"a volume of nowhere": {vmOf("vm-2", "c"), status.Invalid},
	} {
		if err := f.Start(ctx, c.vm); !errors.Is(err, c.kind) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if got := f.x.held(); got != "a:1 b:1" {
		t.Errorf("attached after refused starts: %s", got)
	}
	if s, err := f.Show(ctx, "vm-1"); err != nil || s.State != "paused" || s.Accel != "tcg: the test says so" || s.PID == 0 {
		t.Errorf("show: %+v, %v", s, err)
	}
	if err := f.Resume(ctx, "vm-1"); err != nil {
		t.Error(err)
	}
	if l := f.List(); len(l) != 1 || l[0].State != "running" {
		t.Errorf("list: %+v", l)
	}
	if err := f.Pause(ctx, "vm-1"); err != nil {
		t.Error(err)
	}
	f.x.size(t, "b", 3<<20)
	if err := f.Refresh(ctx, "b", 3<<20); err != nil {
		t.Error(err)
	}
	if err := f.Refresh(ctx, "nobody's", 3<<20); err != nil {
		t.Error(err)
	}
	e, err := f.find(ctx, "vm-1")
	if err != nil {
		t.Fatal(err)
	}
	if size, err := e.m.SizeBytes(ctx, 1); err != nil || size != 3<<20 {
		t.Errorf("grown disk: %d, %v", size, err)
	}
	if size, err := e.m.SizeBytes(ctx, 0); err != nil || size != 1<<20 {
		t.Errorf("the other disk: %d, %v", size, err)
	}
	if err := f.Stop(ctx, "vm-1", true); err != nil {
		t.Fatal(err)
	}
	if got := f.x.held(); got != "" {
		t.Errorf("attached after the stop: %s", got)
	}
	if got := <-f.exits; got != "vm-1: stopped on request" {
		t.Errorf("exit: %s", got)
	}
	for what, err := range map[string]error{
		"stop": f.Stop(ctx, "vm-1", true), "pause": f.Pause(ctx, "vm-1"), "resume": f.Resume(ctx, "vm-1"),
	} {
		if !errors.Is(err, status.NotFound) {
			t.Errorf("%s of a VM that is gone: %v", what, err)
		}
	}
}

// TestAFailedStartLeavesNothing: neither volumes nor the VM's name are taken.
func TestAFailedStartLeavesNothing(t *testing.T) {
	ctx := testContext(t)
	f := newFixture(t, newExports(t, "a", "b"))
	f.x.set("b", nil)
	if err := f.Start(ctx, vmOf("vm-1", "a", "b")); !errors.Is(err, status.Held) || !strings.Contains(err.Error(), "host-2") {
		t.Errorf("a held volume: %v", err)
	}
	f.x.set("", nil)
	bad := vmOf("vm-1", "a", "b")
	bad.MemoryBytes = 1
	if err := f.Start(ctx, bad); !errors.Is(err, status.Invalid) {
		t.Errorf("no memory: %v", err)
	}
	if got := f.x.held(); got != "" {
		t.Errorf("attached: %s", got)
	}
	if err := f.Start(ctx, vmOf("vm-1", "a", "b")); err != nil {
		t.Fatal(err)
	}
}

// TestAMachineThatEndsByItself is noticed: its volumes are free, its name too.
func TestAMachineThatEndsByItself(t *testing.T) {
	ctx := testContext(t)
	f := newFixture(t, newExports(t, "a"))
	for range 2 {
		if err := f.Start(ctx, vmOf("vm-1", "a")); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(f.List()[0].PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if got := <-f.exits; !strings.Contains(got, "killed") {
			t.Errorf("exit: %s", got)
		}
		if got := f.x.held(); got != "" || len(f.List()) != 0 {
			t.Errorf("attached: %s; listed: %v", got, f.List())
		}
	}
	// A volume that cannot be given back is told to who asked for the stop.
	if err := f.Start(ctx, vmOf("vm-1", "a")); err != nil {
		t.Fatal(err)
	}
	f.x.set("", status.Errorf(status.Unavailable, "no metadata leader"))
	if err := f.Stop(ctx, "vm-1", true); !errors.Is(err, status.Unavailable) {
		t.Errorf("stop: %v", err)
	}
	f.x.set("", nil)
}

// TestAdopt restarts the agent: what runs is kept with its volumes, what has
// ended meanwhile is reported once.
func TestAdopt(t *testing.T) {
	ctx := testContext(t)
	x := newExports(t, "a", "b", "c")
	first := newFixture(t, x)
	for name, volume := range map[string]string{"lives": "a", "dies": "b"} {
		if err := first.Start(ctx, vmOf(name, volume)); err != nil {
			t.Fatal(err)
		}
	}
	pids := map[string]int{}
	for _, s := range first.List() {
		pids[s.Name] = s.PID
	}
	first.Close()
	if err := first.Start(ctx, vmOf("late", "c")); !errors.Is(err, status.Shutdown) {
		t.Errorf("start after close: %v", err)
	}
	if err := syscall.Kill(pids["dies"], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	await(t, "the killed one is gone", func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pids["dies"]))
		return err != nil || strings.Contains(string(stat), ") Z ")
	})
	x.attached = map[string]int{"b": 1} // a gateway that restarted knows what metadata says

	second := newFixture(t, x)
	names, err := second.Adopt(ctx)
	if err != nil || len(names) != 1 || names[0] != "lives" {
		t.Fatalf("adopted %v, %v", names, err)
	}
	if got := <-second.exits; got != "dies: it ended while the host process was away" {
		t.Errorf("exit: %s", got)
	}
	if got := x.held(); got != "a:1" {
		t.Errorf("attached: %s", got)
	}
	if s, err := second.Show(ctx, "lives"); err != nil || s.PID != pids["lives"] {
		t.Errorf("show: %+v, %v", s, err)
	}
	if err := second.Start(ctx, vmOf("new", "a")); !errors.Is(err, status.Held) {
		t.Errorf("a volume of an adopted VM: %v", err)
	}
	second.Close()

	// A volume that cannot be attached does not cost the machine its keeper.
	x.set("a", nil)
	third := newFixture(t, x)
	names, err = third.Adopt(ctx)
	if !errors.Is(err, status.Held) || len(names) != 1 {
		t.Errorf("adopted %v, %v", names, err)
	}
	select {
	case got := <-third.exits:
		t.Errorf("reported twice: %s", got)
	default:
	}
	x.set("", nil)
	await(t, "the volume is attached in the end", func() bool { return x.held() == "a:2" })
	if err := third.Stop(ctx, "lives", true); err != nil {
		t.Fatal(err)
	}
	if got := x.held(); got != "a:1" { // attached by the second agent, too
		t.Errorf("attached after the stop: %s", got)
	}
	if left, err := machine.List(filepath.Join(x.dir, "vm")); err != nil || len(left) != 0 {
		t.Errorf("records left: %v, %v", left, err)
	}
}

// TestStartsAndStopsAtOnce has many callers for one VM: one start wins each
// time, and no volume stays attached.
func TestStartsAndStopsAtOnce(t *testing.T) {
	ctx := testContext(t)
	f := newFixture(t, newExports(t, "a"))
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 3 {
				if err := f.Start(ctx, vmOf("vm-1", "a")); err != nil && !errors.Is(err, status.Exists) {
					t.Error(err)
				}
				if err := f.Stop(ctx, "vm-1", true); err != nil && !errors.Is(err, status.NotFound) {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if err := f.StopAll(ctx, true); err != nil {
		t.Fatal(err)
	}
	if got := f.x.held(); got != "" {
		t.Errorf("attached: %s", got)
	}
}
