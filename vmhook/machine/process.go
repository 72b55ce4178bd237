package machine

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/cairnstore/cairn/proto/status"
	"golang.org/x/sys/unix"
)

// recordVersion changes when an older record could be misread.
const recordVersion = 1

// record is DIR/NAME/machine.json: what another host process needs to adopt a
// running machine. It is written before QEMU starts (PID 0), because the host
// may die between the start and the second write; Find then looks for the
// process by its unique -pidfile argument.
type record struct {
	Version int    `json:"version"`
	Spec    Spec   `json:"spec"`
	Accel   Accel  `json:"accel"`
	PID     int    `json:"pid"`
	Start   uint64 `json:"start_ticks"` // of the process, since boot: tells a reused pid
	BootID  string `json:"boot_id"`
	Paused  bool   `json:"paused"` // on request, not by an I/O error
	// Incoming: its memory comes, or came, from another host, and it has not been
	// told to run yet.
	Incoming bool `json:"incoming,omitempty"`
}

func (r *record) save(f files) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return status.Errorf(status.Internal, "VM record: %w", err)
	}
	tmp := f.record + ".new"
	if err := writeSynced(tmp, append(text, '\n')); err != nil {
		return status.Errorf(status.IO, "VM record: %w", err)
	}
	if err := os.Rename(tmp, f.record); err != nil {
		return status.Errorf(status.IO, "VM record: %w", err)
	}
	if err := syncDir(f.dir); err != nil {
		return status.Errorf(status.IO, "VM record: %w", err)
	}
	return nil
}

// writeSynced writes a file that is on the disk when it returns: a rename over
// the record must not leave an empty one after a power cut.
func writeSynced(name string, text []byte) (err error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.Write(text); err != nil {
		return err
	}
	return f.Sync()
}

func syncDir(dir string) (err error) {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	return d.Sync()
}

func loadRecord(dir, name string) (*record, error) {
	f := filesOf(dir, name)
	text, err := os.ReadFile(f.record)
	if errors.Is(err, os.ErrNotExist) {
		return nil, status.Errorf(status.NotFound, "VM %s was never started here (no %s)", name, f.record)
	}
	if err != nil {
		return nil, status.Errorf(status.IO, "VM record: %w", err)
	}
	var r record
	if err := json.Unmarshal(text, &r); err != nil {
		return nil, status.Errorf(status.Corrupt, "VM record %s: %w", f.record, err)
	}
	if r.Version != recordVersion {
		return nil, status.Errorf(status.Unsupported, "VM record %s has version %d and this cairn knows %d; stop the VM with the cairn that started it", f.record, r.Version, recordVersion)
	}
	if r.Spec.Name != name {
		return nil, status.Errorf(status.Corrupt, "VM record %s is of VM %q", f.record, r.Spec.Name)
	}
	r.Spec.Dir = dir
	return &r, nil
}

// livePID returns the pid of the recorded process, 0 when it is gone.
func (r *record) livePID(f files) (int, error) {
	boot, err := bootID()
	if err != nil {
		return 0, err
	}
	if r.BootID != boot {
		return 0, nil
	}
	if r.PID == 0 {
		return scanForPID(f)
	}
	start, err := startTicks(r.PID)
	if err != nil || start == 0 || start != r.Start {
		return 0, err
	}
	return r.PID, nil
}

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", status.Errorf(status.IO, "boot id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// startTicks returns when a process started, in clock ticks since boot; 0 for
// one that is gone or a zombie.
func startTicks(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return 0, nil
	}
	if err != nil {
		return 0, status.Errorf(status.IO, "process %d: %w", pid, err)
	}
	return parseStat(b)
}

// parseStat reads fields 3 (state) and 22 (start time) of /proc/PID/stat; the
// second field is a name in parentheses that may hold anything.
func parseStat(b []byte) (uint64, error) {
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(fields) < 20 {
		return 0, status.Errorf(status.Corrupt, "process state %q has too few fields", b)
	}
	if s := fields[0][0]; s == 'Z' || s == 'X' {
		return 0, nil
	}
	start, err := strconv.ParseUint(string(fields[19]), 10, 64)
	if err != nil {
		return 0, status.Errorf(status.Corrupt, "process start time: %w", err)
	}
	return start, nil
}

// scanForPID finds the process that was given this machine's pid file.
func scanForPID(f files) (int, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return 0, status.Errorf(status.Internal, "look for processes: %w", err)
	}
	want := []byte("\x00-pidfile\x00" + f.pid + "\x00")
	for _, file := range dirs {
		line, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // gone since
		}
		if err != nil {
			return 0, status.Errorf(status.IO, "look for processes: %w", err)
		}
		if bytes.Contains(line, want) {
			return strconv.Atoi(filepath.Base(filepath.Dir(file)))
		}
	}
	return 0, nil
}

// process is a QEMU, our child or one an earlier host process has left.
type process struct {
	pid  int
	done chan struct{} // closed when it has ended
	kill func() error

	mu  sync.Mutex
	why string // how it ended; set before done is closed
}

// spawn starts QEMU in a session of its own, so that nothing that ends the
// host process ends the machine.
func spawn(program string, args []string, f files) (*process, error) {
	log, err := os.OpenFile(f.log, os.O_CREATE|os.O_WRONLY|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		return nil, status.Errorf(status.IO, "QEMU's log: %w", err)
	}
	cmd := exec.Command(program, args...)
	cmd.Dir = f.dir
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	if cerr := log.Close(); err == nil && cerr != nil {
		err = errors.Join(cerr, cmd.Process.Kill(), cmd.Wait())
	}
	if err != nil {
		return nil, status.Errorf(status.IO, "start QEMU: %w", err)
	}
	p := &process{pid: cmd.Process.Pid, done: make(chan struct{}), kill: cmd.Process.Kill}
	go func() {
		why := "exit status 0"
		if err := cmd.Wait(); err != nil {
			why = err.Error()
		}
		p.end(why)
	}()
	return p, nil
}

// adopt watches a process that is not our child, by pidfd.
func adopt(pid int) (*process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, status.Errorf(status.NotFound, "watch process %d: %w", pid, err)
	}
	file := os.NewFile(uintptr(fd), "pidfd")
	conn, err := file.SyscallConn()
	if err != nil {
		return nil, errors.Join(status.Errorf(status.Internal, "watch process %d: %w", pid, err), file.Close())
	}
	p := &process{pid: pid, done: make(chan struct{})}
	p.kill = func() error { return signalPidfd(conn) }
	go func() {
		// The runtime's poller wakes this when the process ends.
		err := conn.Read(func(fd uintptr) bool { return ended(int(fd)) })
		why := "ended"
		if err := errors.Join(err, file.Close()); err != nil {
			why = err.Error()
		}
		p.end(why)
	}()
	return p, nil
}

func signalPidfd(conn syscall.RawConn) error {
	var serr error
	if err := conn.Control(func(fd uintptr) {
		serr = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0)
	}); err != nil {
		return os.ErrProcessDone // the file is closed once the process has ended
	}
	if errors.Is(serr, unix.ESRCH) {
		return os.ErrProcessDone
	}
	return serr
}

func ended(pidfd int) bool {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n > 0
}

func (p *process) end(why string) {
	p.mu.Lock()
	p.why = why
	p.mu.Unlock()
	close(p.done)
}

func (p *process) reason() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.why
}

// lastLines returns the end of a log for an error message.
func lastLines(file string, n int) string {
	text, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.Join(lines, "; ")
}
