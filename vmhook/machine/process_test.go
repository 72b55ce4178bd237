package machine

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cairnstore/cairn/proto/status"
)

// starterEnv turns the test binary into a host process that starts a machine
// and then waits to be killed.
const starterEnv = "CAIRN_TEST_START"

func TestMain(m *testing.M) {
	if text := os.Getenv(starterEnv); text != "" {
		starter(text)
	}
	os.Exit(m.Run())
}

func starter(text string) {
	var spec struct {
		Spec Spec
		Dir  string
	}
	if err := json.Unmarshal([]byte(text), &spec); err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	spec.Spec.Dir, spec.Spec.Paused, spec.Spec.Accel = spec.Dir, true, Accel{Name: "tcg"}
	if _, err := Start(context.Background(), spec.Spec); err != nil {
		fmt.Println("error:", err)
		os.Exit(1)
	}
	fmt.Println("started")
	_, _ = io.Copy(io.Discard, os.Stdin) // until killed, or the test is gone
	os.Exit(0)
}

// bare is a machine without a guest: QEMU runs, its CPUs do not.
func bare(t *testing.T, name string) Spec {
	t.Helper()
	dir := shortDir(t)
	nbd := newExport(t, dir, 1<<20)
	return Spec{
		Name: name, CPUs: 1, MemoryBytes: 64 << 20, Dir: filepath.Join(dir, "vm"),
		Disks:  []Disk{{Name: "v", URI: nbd.uri()}},
		Accel:  Accel{Name: "tcg", Why: "the test says so"},
		Paused: true,
	}
}

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// end stops a machine at the test's end.
func end(t *testing.T, m *Machine) {
	t.Helper()
	t.Cleanup(func() {
		if err := m.Stop(context.Background(), true); err != nil {
			t.Error(err)
		}
		m.Release()
	})
}

// TestMachineOutlivesItsHostProcess kills the process that started a machine,
// and its whole process group, with SIGKILL.
func TestMachineOutlivesItsHostProcess(t *testing.T) {
	ctx := testContext(t)
	spec := bare(t, "outlive")
	text, err := json.Marshal(map[string]any{"Spec": spec, "Dir": spec.Dir})
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	host := exec.Command(self)
	host.Env = append(os.Environ(), starterEnv+"="+string(text))
	host.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stdin, err := host.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := host.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := host.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil || line != "started\n" {
		t.Fatalf("host process: %q, %v", line, err)
	}
	if err := syscall.Kill(-host.Process.Pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := host.Wait(); !errors.As(err, &exit) {
		t.Fatalf("host process: %v", err)
	}
	if err := stdin.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		t.Fatal(err)
	}

	m, err := Find(spec.Dir, spec.Name)
	if err != nil {
		t.Fatal(err)
	}
	end(t, m)
	await(t, ctx, "the adopted machine answers", func() bool { return m.Status().State == "paused" })
	if got := m.Spec().Disks[0].Name; got != "v" {
		t.Errorf("the adopted machine's disk is called %q", got)
	}
	if err := m.Stop(ctx, true); err != nil {
		t.Fatal(err)
	}
	if _, err := Find(spec.Dir, spec.Name); !errors.Is(err, status.NotFound) {
		t.Errorf("find after the end: %v", err)
	}
}

// TestCrashBetweenStartAndRecord finds a QEMU whose pid nobody wrote down.
func TestCrashBetweenStartAndRecord(t *testing.T) {
	ctx := testContext(t)
	m, err := Start(ctx, bare(t, "lost"))
	if err != nil {
		t.Fatal(err)
	}
	pid := m.Status().PID
	m.Release()
	rec := m.rec
	rec.PID, rec.Start = 0, 0
	if err := rec.save(m.files); err != nil {
		t.Fatal(err)
	}
	found, err := Find(m.spec.Dir, "lost")
	if err != nil {
		t.Fatal(err)
	}
	end(t, found)
	if got := found.Status().PID; got != pid {
		t.Errorf("found pid %d, want %d", got, pid)
	}
}

// TestForeignProcessIsNotAdopted gives the record a live process's pid, as
// after a reboot: neither the start time nor the boot id fits.
func TestForeignProcessIsNotAdopted(t *testing.T) {
	dir := shortDir(t)
	f := filesOf(dir, "old")
	if err := os.MkdirAll(f.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	boot, err := bootID()
	if err != nil {
		t.Fatal(err)
	}
	start, err := startTicks(os.Getpid())
	if err != nil || start == 0 {
		t.Fatalf("own start: %d, %v", start, err)
	}
	good := record{Version: recordVersion, Spec: Spec{Name: "old"}, PID: os.Getpid(), Start: start, BootID: boot}
	if pid, err := good.livePID(f); err != nil || pid != os.Getpid() {
		t.Fatalf("the control: %d, %v", pid, err)
	}
	for what, change := range map[string]func(*record){
		"another start": func(r *record) { r.Start++ },
		"another boot":  func(r *record) { r.BootID = "x" },
		"no pid":        func(r *record) { r.PID = 0 },
		"one that ended before its start was known": func(r *record) { r.PID, r.Start = 1<<22+1, 0 }, // above every pid
	} {
		rec := good
		change(&rec)
		if err := rec.save(f); err != nil {
			t.Fatal(err)
		}
		if _, err := Find(dir, "old"); !errors.Is(err, status.NotFound) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for what, text := range map[string]string{"garbage": "{", "a newer version": `{"version": 99, "spec": {"name": "old"}}`, "another VM": `{"version": 1, "spec": {"name": "x"}}`} {
		if err := os.WriteFile(f.record, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Find(dir, "old"); err == nil || errors.Is(err, status.NotFound) {
			t.Errorf("%s: %v", what, err)
		}
		if _, err := os.Stat(f.record); err != nil {
			t.Errorf("%s: the record was touched: %v", what, err)
		}
	}
}

// TestKilledQEMU is noticed, explained, and leaves no socket.
func TestKilledQEMU(t *testing.T) {
	ctx := testContext(t)
	m, err := Start(ctx, bare(t, "killed"))
	if err != nil {
		t.Fatal(err)
	}
	end(t, m)
	if err := syscall.Kill(m.Status().PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	select {
	case <-m.Done():
	case <-ctx.Done():
		t.Fatal("nobody noticed")
	}
	if s := m.Status(); s.State != "stopped" || !strings.Contains(s.Detail, "killed") || s.PID != 0 {
		t.Errorf("status: %+v", s)
	}
	for _, sock := range []string{m.files.monitor, m.files.qmp, m.files.console} {
		if _, err := os.Stat(sock); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s stays: %v", sock, err)
		}
	}
	for what, f := range map[string]func() error{
		"pause":  func() error { return m.Pause(ctx) },
		"resume": func() error { return m.Resume(ctx) },
		"grow":   func() error { return m.Grow(ctx, 0, 2<<20) },
	} {
		if err := f(); err == nil || !strings.Contains(err.Error(), "ended") {
			t.Errorf("%s of an ended machine: %v", what, err)
		}
	}
	if err := m.Stop(ctx, false); err != nil {
		t.Errorf("stopping what has ended: %v", err)
	}
	if err := m.Forget(); err != nil {
		t.Error(err)
	}
	if names, err := List(m.spec.Dir); err != nil || len(names) != 0 {
		t.Errorf("list after forgetting: %v, %v", names, err)
	}
}

// TestHungQEMU is stopped all the same.
func TestHungQEMU(t *testing.T) {
	ctx := testContext(t)
	m, err := Start(ctx, bare(t, "hung"))
	if err != nil {
		t.Fatal(err)
	}
	end(t, m)
	if err := syscall.Kill(m.Status().PID, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := m.Stop(ctx, true); err != nil {
		t.Fatal(err)
	}
	if m.Exit() == "" {
		t.Error("stopped, but not ended")
	}
}

// TestStopWithoutAnswer asks a machine to power off that cannot: cancelling
// leaves it, a deadline cuts it off.
func TestStopWithoutAnswer(t *testing.T) {
	ctx := testContext(t)
	m, err := Start(ctx, bare(t, "deaf"))
	if err != nil {
		t.Fatal(err)
	}
	end(t, m)
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if err := m.Stop(cancelled, false); !errors.Is(err, status.Shutdown) {
		t.Errorf("cancelled stop: %v", err)
	}
	if m.Exit() != "" {
		t.Fatal("a cancelled stop ended the machine")
	}
	short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	if err := m.Stop(short, false); err != nil || m.Exit() == "" {
		t.Errorf("stop with a deadline: %v, exit %q", err, m.Exit())
	}
}

// TestStartErrors says what is wrong, and leaves neither process nor socket.
func TestStartErrors(t *testing.T) {
	ctx := testContext(t)
	good := bare(t, "good")
	for _, c := range []struct {
		what   string
		change func(*Spec)
		kind   status.Kind
		says   string
	}{
		{"no QEMU", func(s *Spec) { s.QEMU = "qemu-system-none" }, status.NotFound, "apt-get install qemu-system-x86"},
		{"no server", func(s *Spec) { s.Disks = []Disk{{URI: "nbd+unix:///v?socket=/nowhere/nbd.sock"}} }, status.Invalid, "Failed to connect"},
		{"not QEMU", func(s *Spec) { s.QEMU = "false" }, status.Invalid, "ended at once"},
		{"no kernel file", func(s *Spec) { s.Kernel = "/nowhere/vmlinuz" }, status.NotFound, "/nowhere/vmlinuz"},
		{"no kernel at all", func(s *Spec) { s.Kernel = "/etc/passwd" }, status.Invalid, "ended at once"},
		{"long directory", func(s *Spec) { s.Dir += strings.Repeat("/longer", 15) }, status.Invalid, "shorter directory"},
		{"name", func(s *Spec) { s.Name = "../x" }, status.Invalid, "VM name"},
		{"TLS", func(s *Spec) { s.Disks = []Disk{{URI: "nbds://h/v"}} }, status.Unsupported, "without TLS"},
	} {
		spec := good
		c.change(&spec)
		m, err := Start(ctx, spec)
		if err == nil {
			end(t, m)
			t.Errorf("%s: started", c.what)
			continue
		}
		if !errors.Is(err, c.kind) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v (%v), want %v saying %q", c.what, err, status.Of(err), c.kind, c.says)
		}
	}
	if names, err := List(good.Dir); err != nil || len(names) != 0 {
		t.Errorf("machines that never started are listed: %v, %v", names, err)
	}
	if pid, err := scanForPID(filesOf(good.Dir, good.Name)); err != nil || pid != 0 {
		t.Errorf("process %d is left, %v", pid, err)
	}
	m, err := Start(ctx, good)
	if err != nil {
		t.Fatalf("a good start after all that: %v", err)
	}
	end(t, m)
}

// TestServerThatSaysNothing grows onto a server that accepts and is silent:
// QEMU answers again in time, and the disk is as before.
func TestServerThatSaysNothing(t *testing.T) {
	ctx := testContext(t)
	spec := bare(t, "silent")
	m, err := Start(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	end(t, m)
	silent := filepath.Join(filepath.Dir(spec.Dir), "silent.sock")
	m.spec.Disks = []Disk{{Name: "v", URI: "nbd+unix:///v?socket=" + silent}}
	hang := exec.Command("nbdkit", "--foreground", "--exit-with-parent", "--unix", silent, "--pidfile", silent+".pid", "null", "size=2M")
	if err := hang.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		var exit *exec.ExitError
		if err := hang.Process.Kill(); err != nil {
			t.Error(err)
		}
		if err := hang.Wait(); err != nil && !errors.As(err, &exit) {
			t.Error(err)
		}
	})
	await(t, ctx, "the silent server listens", func() bool { return ready(silent + ".pid") })
	if err := hang.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	short, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
	defer cancel()
	for _, ctx := range []context.Context{short, ctx} { // given up, and waited for
		if err := m.Grow(ctx, 0, 2<<20); err == nil {
			t.Error("growing onto a silent server succeeded")
		}
	}
	size, err := m.SizeBytes(ctx, 0)
	if err != nil || size != 1<<20 {
		t.Errorf("afterwards the disk has %d bytes, %v; want %d", size, err, 1<<20)
	}
	if nodes, err := m.blockNodes(ctx); err != nil || len(nodes) != 2 {
		t.Errorf("afterwards the nodes are %v, %v", nodes, err)
	}
}

// bootSector reads the disk's second sector by INT 13h and writes the text in
// it to the first serial port.
var bootSector = []byte{
	0x31, 0xc0, 0x8e, 0xd8, 0x8e, 0xc0, // ds = es = 0
	0xb8, 0x01, 0x02, 0xb9, 0x02, 0x00, 0xb6, 0x00, 0xbb, 0x00, 0x7e, // one sector, number 2, to 0x7e00
	0xcd, 0x13, 0x72, 0x0e, // int 13h; jc end
	0xbe, 0x00, 0x7e, // si = 0x7e00
	0xac, 0x84, 0xc0, 0x74, 0x06, // next: lodsb; test al,al; jz end
	0xba, 0xf8, 0x03, 0xee, 0xeb, 0xf5, // out 0x3f8,al; jmp next
	0xf4, 0xeb, 0xfd, // end: hlt; jmp end
}

// TestBootsFromItsDisk has no kernel: the firmware boots the first disk.
func TestBootsFromItsDisk(t *testing.T) {
	ctx := testContext(t)
	spec := bare(t, "disk")
	spec.Paused = false
	const text = "read from the second sector\n"
	sectors := make([]byte, 1024)
	copy(sectors, bootSector)
	sectors[510], sectors[511] = 0x55, 0xaa
	copy(sectors[512:], text)
	f, err := os.OpenFile(filepath.Join(filepath.Dir(spec.Dir), "disk"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(sectors, 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	for run := range 2 {
		m, err := Start(ctx, spec)
		if err != nil {
			t.Fatal(err)
		}
		end(t, m)
		await(t, ctx, "the boot sector's text on the console", func() bool {
			log, err := os.ReadFile(m.Status().Log)
			return err == nil && strings.Contains(string(log), text)
		})
		if err := m.Stop(ctx, true); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(m.files.consoleLog + ".old"); (err == nil) != (run == 1) {
			t.Errorf("run %d: the log of the run before: %v", run, err)
		}
	}
}

// TestLogsAreBounded fills a log by a writer that has it open, as QEMU has.
func TestLogsAreBounded(t *testing.T) {
	file := filepath.Join(t.TempDir(), "log")
	if err := trimLog(file, 10); err != nil {
		t.Errorf("no log yet: %v", err)
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	content := func(name string) string {
		text, err := os.ReadFile(name)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
		return string(text)
	}
	for _, c := range []struct{ write, log, old string }{
		{"0123456789", "0123456789", ""},
		{"abc", "", "3456789abc"},
		{"def", "def", "3456789abc"},
		{"ghijklmnopqrst", "", "klmnopqrst"},
	} {
		if _, err := f.WriteString(c.write); err != nil {
			t.Fatal(err)
		}
		if err := trimLog(file, 10); err != nil {
			t.Fatal(err)
		}
		if log, old := content(file), content(file+".old"); log != c.log || old != c.old {
			t.Errorf("after %q: %q and old %q, want %q and %q", c.write, log, old, c.log, c.old)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}
