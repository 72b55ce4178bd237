// Package machine runs one virtual machine: a QEMU process whose disks are
// cairn volumes over NBD, and which outlives the host process that started it.
//
// Duty: start and adopt (Start, Find), stop, pause, resume, grow a disk online,
// and let a guest that was stopped by a lost disk go on once the disk is back.
// Floor: F3. It attaches no volume and keeps no list of machines (vmhook/agent
// does). Of a migration it does QEMU's part: who decides whether a machine may run
// is told at migrate.go.
//
// The machine's files are in DIR/NAME: machine.json (how to find it again),
// qemu.pid (locked by QEMU while it runs, so that there is one at most),
// monitor.sock (ours), qmp.sock (a second monitor, for people and tools), console.sock and console.log (serial
// port), qemu.log (what QEMU says).
package machine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/vmhook/kvm"
	"github.com/cairnstore/cairn/vmhook/qmp"
)

// Machine is one running QEMU. All methods may be called at any time.
type Machine struct {
	spec  Spec
	files files
	accel Accel
	proc  *process

	ctx     context.Context // ends at Release and when QEMU does
	done    chan struct{}   // closed when QEMU has ended and its sockets are removed
	release context.CancelFunc
	wg      sync.WaitGroup

	ops sync.Mutex // held by operations that must not overlap: stop, pause, resume, grow, heal

	mu       sync.Mutex
	rec      record
	client   *qmp.Client   // nil while there is no connection
	changed  chan struct{} // closed and replaced at each change of client or state
	state    string        // by QEMU: running, paused, io-error, …
	stopping bool          // no healing any more
	released bool          // this process watches no more
	ioErrors uint64
	trouble  string        // why the guest stands still or cannot be asked; "" when all is well
	shutdown string        // QEMU's reason for ending, from its last event
	heal     chan struct{} // capacity 1: there may be something to heal
	moving   bool          // its memory is being sent: no pause, no growing
	stopped  time.Time     // when its processors were last seen to stop
}

// Status is what a machine is doing.
type Status struct {
	Name     string
	State    string // running, paused, arriving, io-error (waits for its disk), unreachable, stopped
	Detail   string // why, when State needs an explanation
	Accel    string // kvm, or tcg and why not kvm
	PID      int
	Console  string // unix socket of the serial console
	Log      string // file with all console output
	QMP      string // unix socket of a monitor nobody else uses
	IOErrors uint64 // how often a disk's error stopped the guest since Start or Find
}

// startTimeout bounds a start when the caller's context does not.
const startTimeout = 30 * time.Second

// Start starts a machine and returns when its monitor answers; the guest is
// then booting. ctx bounds the start only.
func Start(ctx context.Context, spec Spec) (*Machine, error) {
	dir, err := filepath.Abs(spec.Dir)
	if err != nil {
		return nil, status.Errorf(status.IO, "VM directory: %w", err)
	}
	spec.Dir = dir
	if err := spec.check(); err != nil {
		return nil, err
	}
	program, err := preconditions(&spec)
	if err != nil {
		return nil, err
	}
	if spec.Accel.Name == "" {
		spec.Accel = Choose(kvm.Probe(ctx))
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	m, err := launch(ctx, spec, program, true)
	if err != nil && noSandbox(err) {
		m, err = launch(ctx, spec, program, false)
	}
	return m, err
}

// preconditions checks what QEMU would report less clearly, and that the
// machine is not running already. It returns the program to start.
func preconditions(s *Spec) (string, error) {
	name := s.QEMU
	if name == "" {
		name = "qemu-system-x86_64"
	}
	program, err := exec.LookPath(name)
	if err != nil {
		return "", status.Errorf(status.NotFound, "VM %s: QEMU is not installed (%s): apt-get install qemu-system-x86", s.Name, name)
	}
	for _, file := range []string{s.Kernel, s.Initrd} {
		if file == "" {
			continue
		}
		if _, err := os.Stat(file); err != nil {
			return "", status.Errorf(status.NotFound, "VM %s: %w", s.Name, err)
		}
	}
	rec, err := loadRecord(s.Dir, s.Name)
	if errors.Is(err, status.NotFound) {
		return program, nil
	}
	if err != nil {
		return "", err
	}
	pid, err := rec.livePID(filesOf(s.Dir, s.Name))
	if err != nil {
		return "", err
	}
	if pid != 0 {
		return "", status.Errorf(status.Exists, "VM %s is running already (pid %d)", s.Name, pid)
	}
	return program, nil
}

// noSandbox tells a QEMU, or a kernel, that cannot do -sandbox.
func noSandbox(err error) bool {
	return strings.Contains(err.Error(), "sandbox") || strings.Contains(err.Error(), "seccomp")
}

// launch starts QEMU and waits until it answers.
func launch(ctx context.Context, spec Spec, program string, sandbox bool) (*Machine, error) {
	f := filesOf(spec.Dir, spec.Name)
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	args, err := argv(&spec, f, spec.Accel, sandbox)
	if err != nil {
		return nil, err
	}
	rec := record{Version: recordVersion, Spec: spec, Accel: spec.Accel, BootID: boot, Paused: spec.Paused, Incoming: spec.Incoming}
	if err := prepareDir(f, &rec); err != nil {
		return nil, err
	}
	proc, err := spawn(program, args, f)
	if err != nil {
		return nil, errors.Join(err, Forget(spec.Dir, spec.Name))
	}
	rec.PID = proc.pid
	if rec.Start, err = startTicks(proc.pid); err == nil {
		err = rec.save(f)
	}
	if err != nil {
		return nil, abandon(proc, &spec, err)
	}
	m := newMachine(rec, f, proc)
	if err := m.awaitMonitor(ctx); err != nil {
		err = m.startError(ctx, err)
		m.Release()
		return nil, abandon(proc, &spec, err)
	}
	return m, nil
}

// prepareDir makes the machine's directory. The console log of the run before
// is kept as console.log.old, so that logs do not pile up.
func prepareDir(f files, rec *record) error {
	if err := os.MkdirAll(f.dir, 0o700); err != nil {
		return status.Errorf(status.IO, "VM directory: %w", err)
	}
	if err := os.Rename(f.consoleLog, f.consoleLog+".old"); err != nil && !errors.Is(err, os.ErrNotExist) {
		return status.Errorf(status.IO, "console log: %w", err)
	}
	return rec.save(f)
}

// abandon ends a process whose start went wrong, waits for it, and leaves only
// its log.
func abandon(proc *process, s *Spec, why error) error {
	if err := proc.kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("%w; and QEMU (pid %d) could not be killed: %v", why, proc.pid, err)
	}
	<-proc.done
	return errors.Join(why, Forget(s.Dir, s.Name))
}

// startError explains why the monitor never answered.
func (m *Machine) startError(ctx context.Context, err error) error {
	select {
	case <-m.proc.done:
		return status.Errorf(status.Invalid, "VM %s: QEMU ended at once (%s): %s", m.spec.Name, m.proc.reason(), lastLines(m.files.log, 5))
	default:
	}
	if ctx.Err() != nil {
		return status.Errorf(status.Timeout, "VM %s: QEMU started but its monitor did not answer: %w; its log: %s", m.spec.Name, err, lastLines(m.files.log, 5))
	}
	return err
}

// Find adopts a machine that runs, typically after the host process was
// restarted. status.NotFound: there is none of that name, or it has ended.
func Find(dir, name string) (*Machine, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, status.Errorf(status.IO, "VM directory: %w", err)
	}
	if !goodName.MatchString(name) {
		return nil, status.Errorf(status.Invalid, "VM name %q is none", name)
	}
	rec, err := loadRecord(dir, name)
	if err != nil {
		return nil, err
	}
	f := filesOf(dir, name)
	pid, err := rec.livePID(f)
	if err != nil {
		return nil, err
	}
	if pid == 0 {
		return nil, status.Errorf(status.NotFound, "VM %s is not running", name)
	}
	proc, err := adopt(pid)
	if err != nil {
		return nil, err
	}
	if rec.PID == 0 {
		rec.PID = pid
		if rec.Start, err = startTicks(pid); err != nil {
			return nil, err
		}
		if err := rec.save(f); err != nil {
			return nil, err
		}
	}
	return newMachine(*rec, f, proc), nil
}

// List returns the names of the machines that were ever started in dir; Find
// tells which of them run.
func List(dir string) ([]string, error) {
	found, err := filepath.Glob(filepath.Join(dir, "*", "machine.json"))
	if err != nil {
		return nil, status.Errorf(status.Invalid, "VM directory %q: %w", dir, err)
	}
	var names []string
	for _, f := range found {
		names = append(names, filepath.Base(filepath.Dir(f)))
	}
	return names, nil
}

// Volumes returns the names of the disks of a machine that was started in dir,
// also when it has ended.
func Volumes(dir, name string) ([]string, error) {
	rec, err := loadRecord(dir, name)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, d := range rec.Spec.Disks {
		names = append(names, d.Name)
	}
	return names, nil
}

// Rebooted reports whether a machine was started before the host's last restart.
func Rebooted(dir, name string) (bool, error) {
	rec, err := loadRecord(dir, name)
	if err != nil {
		return false, err
	}
	boot, err := bootID()
	return err == nil && rec.BootID != boot, err
}

// newMachine begins to watch a process.
func newMachine(rec record, f files, proc *process) *Machine {
	m := &Machine{
		spec: rec.Spec, files: f, accel: rec.Accel, proc: proc, rec: rec,
		done: make(chan struct{}), changed: make(chan struct{}), heal: make(chan struct{}, 1), state: "unreachable",
	}
	m.ctx, m.release = context.WithCancel(context.Background())
	m.wg.Add(2)
	go m.awaitEnd()
	go m.monitor()
	go m.healer()
	return m
}

// awaitEnd waits for QEMU to end, however long after Release, and tells Done.
// The sockets a killed QEMU leaves are removed, so that nobody connects to a
// machine of the past; after Release that is the next watcher's.
func (m *Machine) awaitEnd() {
	<-m.proc.done
	m.mu.Lock()
	released := m.released
	m.mu.Unlock()
	m.release()
	defer close(m.done)
	if released {
		return
	}
	for _, sock := range []string{m.files.monitor, m.files.qmp, m.files.console, m.files.memory} {
		if err := os.Remove(sock); err != nil && !errors.Is(err, os.ErrNotExist) {
			m.note("a socket stays behind: " + err.Error())
		}
	}
}

// Name returns the machine's name.
func (m *Machine) Name() string { return m.spec.Name }

// Spec returns what the machine was started from.
func (m *Machine) Spec() Spec { return m.spec }

// Forget removes the record of a machine that has ended, once its owner has
// done what is to be done about the end; List and Find know it no more. Its
// logs stay.
func (m *Machine) Forget() error {
	if m.Exit() == "" {
		return status.Errorf(status.Conflict, "VM %s is running (pid %d)", m.spec.Name, m.proc.pid)
	}
	return Forget(m.spec.Dir, m.spec.Name)
}

// Forget is the method for a machine that ended while nobody watched: Find has
// answered status.NotFound.
func Forget(dir, name string) error {
	f := filesOf(dir, name)
	for _, file := range []string{f.record, f.pid, f.monitor, f.qmp, f.console, f.memory} {
		if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
			return status.Errorf(status.IO, "forget VM %s: %w", name, err)
		}
	}
	return nil
}

// Done is closed when QEMU has ended; Exit says why.
func (m *Machine) Done() <-chan struct{} { return m.done }

// Exit says how QEMU ended, "" while it runs.
func (m *Machine) Exit() string {
	select {
	case <-m.proc.done:
	default:
		return ""
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.shutdown != "" {
		return m.shutdown
	}
	return "QEMU ended: " + m.proc.reason()
}

// Release stops watching the machine and leaves it running. Every other method
// fails afterwards.
func (m *Machine) Release() {
	m.mu.Lock()
	m.released = true
	m.mu.Unlock()
	m.release()
	m.wg.Wait()
}

// Status returns what the machine is doing, as last told by QEMU.
func (m *Machine) Status() Status {
	exit := m.Exit()
	m.mu.Lock()
	defer m.mu.Unlock()
	s := Status{
		Name: m.spec.Name, State: m.state, Detail: m.trouble, Accel: m.accel.String(), PID: m.proc.pid,
		Console: m.files.console, Log: m.files.consoleLog, QMP: m.files.qmp, IOErrors: m.ioErrors,
	}
	switch {
	case exit != "":
		s.State, s.Detail, s.PID = "stopped", exit, 0
	case m.rec.Incoming:
		s.State, s.Detail = "arriving", "its memory comes from another host"
	case m.rec.Paused && s.State != "running":
		s.State = "paused" // also when it had no disk before
	case m.client == nil:
		s.State, s.Detail = "unreachable", "no connection to QEMU's monitor"
	}
	return s
}
