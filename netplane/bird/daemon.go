package bird

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cairnstore/cairn/proto/status"
)

// Bounds of time. A dead BIRD is noticed at once, a wedged one within
// watchEvery + answerIn.
const (
	checkIn      = 10 * time.Second // bird -p
	readyIn      = 5 * time.Second  // from exec to an answer on the socket
	readyEvery   = 10 * time.Millisecond
	watchEvery   = 400 * time.Millisecond
	answerIn     = 500 * time.Millisecond
	stopIn       = 3 * time.Second // a graceful stop
	restartFirst = 50 * time.Millisecond
	restartMax   = 2 * time.Second
)

// Config says what to run, and where.
type Config struct {
	Dir         string // for the configuration and the control socket; made if missing
	Topology    Topology
	Node        string       // which node this is
	NamespaceFD int          // descriptor of a network namespace, which stays the caller's; 0: the process's
	Binary      string       // "": bird, from PATH or /usr/sbin
	Log         *slog.Logger // nil: no log
}

// Daemon is one BIRD that is kept running until it is closed. Its methods may
// be called concurrently.
type Daemon struct {
	cfg    Config
	binary string
	thread *thread
	only   net.Listener // an abstract socket: one per network namespace
	quit   chan struct{}
	done   chan struct{}
	once   sync.Once
	closed error

	applying sync.Mutex // one Apply at a time

	mu  sync.Mutex // guards the fields below
	pid int        // 0: not running
	// restarts counts starts after the first one.
	restarts int
	why      string // of the last restart
}

// Start checks the topology, with BIRD too, and returns when BIRD answers.
// Nothing is applied before all checks have passed.
func Start(cfg Config) (d *Daemon, err error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	d = &Daemon{cfg: cfg, quit: make(chan struct{}), done: make(chan struct{})}
	if d.binary, err = find(cfg.Binary); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make BIRD's directory: %w", err)
	}
	text, err := d.render(cfg.Topology)
	if err != nil {
		return nil, err
	}
	if d.thread, err = newThread(cfg.NamespaceFD); err != nil {
		return nil, err
	}
	if err = d.begin(text); err != nil {
		if d.only != nil {
			err = errors.Join(err, d.only.Close())
		}
		d.thread.close()
		return nil, err
	}
	return d, nil
}

func (d *Daemon) begin(text string) error {
	if err := d.thread.do(func() (err error) {
		d.only, err = net.Listen("unix", "@cairn-netplane")
		return err
	}); errors.Is(err, unix.EADDRINUSE) {
		return status.Errorf(status.Held, "another netplane runs in this network namespace: a host has one; stop that first")
	} else if err != nil {
		return fmt.Errorf("cannot take the netplane of this network namespace: %w", err)
	}
	if err := d.thread.do(hashPorts); err != nil {
		return err
	}
	if err := os.WriteFile(d.conf(), []byte(text), 0o600); err != nil {
		return fmt.Errorf("cannot write BIRD's configuration: %w", err)
	}
	cmd, err := d.launch()
	if err != nil {
		return err
	}
	go d.supervise(cmd)
	return nil
}

func find(binary string) (string, error) {
	names := []string{binary}
	if binary == "" {
		names = []string{"bird", "/usr/sbin/bird"}
	}
	for _, n := range names {
		if p, err := exec.LookPath(n); err == nil {
			return p, nil
		}
	}
	return "", status.Errorf(status.Unavailable, "BIRD 2 is not installed (%s not found): install the package bird2", names[0])
}

func (d *Daemon) conf() string   { return filepath.Join(d.cfg.Dir, "bird.conf") }
func (d *Daemon) socket() string { return filepath.Join(d.cfg.Dir, "bird.ctl") }

// render makes the configuration and has BIRD check it, beside the one in use.
func (d *Daemon) render(t Topology) (text string, err error) {
	if t, err = t.Normal(); err != nil {
		return "", err
	}
	if text, err = t.Config(d.cfg.Node); err != nil {
		return "", err
	}
	if err = t.checkMD5(d.cfg.Node); err != nil {
		return "", err
	}
	next := d.conf() + ".check"
	if err := os.WriteFile(next, []byte(text), 0o600); err != nil {
		return "", fmt.Errorf("cannot write BIRD's configuration: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), checkIn)
	defer cancel()
	out, cerr := exec.CommandContext(ctx, d.binary, "-p", "-c", next).CombinedOutput()
	if err := os.Remove(next); err != nil {
		return "", fmt.Errorf("cannot remove the checked configuration: %w", err)
	}
	if cerr != nil {
		return "", status.Errorf(status.Invalid, "BIRD refuses the configuration of %s: %s (%w)", d.cfg.Node, strings.TrimSpace(string(out)), cerr)
	}
	return text, nil
}

// running is a BIRD process.
type running struct {
	cmd  *exec.Cmd
	gone chan struct{} // closed when it has ended
	err  error         // how; read after gone
}

// launch starts BIRD and waits until it answers.
func (d *Daemon) launch() (*running, error) {
	if err := os.Remove(d.socket()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("cannot remove the socket of a dead BIRD: %w", err)
	}
	out := &logWriter{log: d.cfg.Log.With("node", d.cfg.Node)}
	cmd := exec.Command(d.binary, "-f", "-c", d.conf(), "-s", d.socket())
	cmd.Stdout, cmd.Stderr = out, out
	// It dies with the thread that started it, which lives as long as d: routes
	// nobody watches over would be worse than none.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true}
	if err := d.thread.do(cmd.Start); err != nil {
		return nil, status.Errorf(status.Unavailable, "cannot start BIRD: %w", err)
	}
	p := &running{cmd: cmd, gone: make(chan struct{})}
	go func() { defer close(p.gone); p.err = cmd.Wait() }()
	t := time.NewTicker(readyEvery)
	defer t.Stop()
	for end := time.Now().Add(readyIn); ; {
		_, err := d.ask("show status")
		if err == nil {
			d.mu.Lock()
			d.pid = cmd.Process.Pid
			d.mu.Unlock()
			return p, nil
		}
		select {
		case <-p.gone:
			return nil, errors.Join(status.Errorf(status.Unavailable, "BIRD ended at its start (%v): %s", p.err, out.last()), d.tidy())
		case <-t.C:
			if time.Now().After(end) {
				return nil, errors.Join(status.Errorf(status.Timeout, "BIRD gave no answer within %v: %w", readyIn, err), d.kill(p), d.tidy())
			}
		}
	}
}

// supervise watches over BIRD until the daemon is closed.
func (d *Daemon) supervise(p *running) {
	defer close(d.done)
	t := time.NewTicker(watchEvery)
	defer t.Stop()
	wait := restartFirst
	known := map[string]string{}
	for {
		var why error
		select {
		case <-d.quit:
			d.closed = d.stop(p)
			return
		case <-p.gone:
			why = fmt.Errorf("BIRD ended by itself: %v", p.err)
		case <-t.C:
			out, err := d.ask("show protocols")
			if err == nil {
				err = d.nudge(out, known)
			}
			if err == nil {
				wait = restartFirst
				continue
			} else {
				why = errors.Join(fmt.Errorf("BIRD does not answer: %w", err), d.kill(p))
			}
		}
		d.note(why)
		var ok bool
		if p, ok = d.relaunch(&wait); !ok {
			return
		}
	}
}

// nudge has BIRD compute the routes of an OSPF session anew when a neighbour's
// state has changed: known, by session, is what they were. BIRD itself does it
// when an announcement changes, and a link that comes back before its loss was
// announced (every 5 s at most) changes none: the way over it would stay unused
// until something else changes, for up to half an hour.
func (d *Daemon) nudge(protocols string, known map[string]string) error {
	for _, s := range parseSessions(protocols) {
		if s.Kind != "OSPF" {
			continue
		}
		out, err := d.ask("show ospf neighbors " + s.Name)
		if err != nil {
			return err
		}
		now := neighbours(out)
		if now == known[s.Name] {
			continue
		}
		known[s.Name] = now
		if _, err := d.ask("reload in " + s.Name); err != nil {
			return err
		}
	}
	return nil
}

// relaunch starts BIRD until it runs; false when the daemon is closed meanwhile.
// A new BIRD takes over or removes the kernel routes its predecessor left.
func (d *Daemon) relaunch(wait *time.Duration) (*running, bool) {
	for {
		p, err := d.launch()
		if err == nil {
			d.cfg.Log.Info("BIRD runs again", "node", d.cfg.Node)
			return p, true
		}
		d.note(err)
		t := time.NewTimer(*wait)
		*wait = min(2**wait, restartMax)
		select {
		case <-t.C:
		case <-d.quit:
			t.Stop()
			d.closed = d.tidy()
			return nil, false
		}
	}
}

func (d *Daemon) note(why error) {
	d.mu.Lock()
	d.pid, d.why = 0, why.Error()
	d.restarts++
	d.mu.Unlock()
	d.cfg.Log.Warn("BIRD is started again", "node", d.cfg.Node, "why", why)
}

// kill ends a process at once and waits for its end.
func (d *Daemon) kill(p *running) error {
	err := p.cmd.Process.Kill()
	if errors.Is(err, os.ErrProcessDone) {
		err = nil
	}
	<-p.gone
	return err
}

// stop ends BIRD: gracefully, so that it takes its routes out of the kernel and
// tells its neighbours.
func (d *Daemon) stop(p *running) error {
	var errs []error
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		errs = append(errs, fmt.Errorf("cannot stop BIRD: %w", err))
	}
	t := time.NewTimer(stopIn)
	defer t.Stop()
	select {
	case <-p.gone:
	case <-t.C:
		errs = append(errs, d.kill(p))
	}
	return errors.Join(append(errs, d.tidy())...)
}

// tidy removes what a BIRD that was killed leaves: its socket and its routes.
func (d *Daemon) tidy() error {
	err := os.Remove(d.socket())
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, d.thread.do(flushRoutes))
}

// Apply changes to another topology. Sessions and routes that stay the same
// are not touched; a topology that is refused changes nothing.
func (d *Daemon) Apply(t Topology) error {
	d.applying.Lock()
	defer d.applying.Unlock()
	text, err := d.render(t)
	if err != nil {
		return err
	}
	next := d.conf() + ".new"
	if err := os.WriteFile(next, []byte(text), 0o600); err != nil {
		return fmt.Errorf("cannot write BIRD's configuration: %w", err)
	}
	if err := os.Rename(next, d.conf()); err != nil {
		return err
	}
	out, err := d.ask("configure soft")
	if err != nil {
		return status.Errorf(status.Unavailable, "BIRD was not told of its new configuration, it takes it when it starts again: %w", err)
	}
	if !strings.Contains(out, "Reconfigur") {
		return status.Errorf(status.Invalid, "BIRD refuses the new configuration: %s", strings.TrimSpace(out))
	}
	return nil
}

// Close stops BIRD and takes its routes away. No process, socket or route of
// it is left.
func (d *Daemon) Close() error {
	d.once.Do(func() {
		close(d.quit)
		<-d.done
		d.closed = errors.Join(d.closed, d.only.Close())
		d.thread.close()
	})
	return d.closed
}

// hashPorts has the kernel choose among next hops by ports too: otherwise all
// connections between two hosts take the same one.
func hashPorts() error {
	for _, family := range []string{"ipv4", "ipv6"} {
		name := "/proc/sys/net/" + family + "/fib_multipath_hash_policy"
		if err := os.WriteFile(name, []byte("1"), 0o644); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("cannot spread connections over next hops: %w", err)
		}
	}
	return nil
}

// thread is one operating system thread in a network namespace. It ends at
// close, so no goroutine ever finds itself in a strange namespace.
type thread struct {
	work chan func()
	done chan struct{}
}

func newThread(fd int) (*thread, error) {
	t := &thread{work: make(chan func()), done: make(chan struct{})}
	entered := make(chan error)
	go func() {
		defer close(t.done)
		runtime.LockOSThread() // and never unlocked: the thread is not reused
		if fd != 0 {
			if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
				entered <- fmt.Errorf("enter the network namespace: %w", err)
				return
			}
		}
		entered <- nil
		for f := range t.work {
			f()
		}
	}()
	return t, <-entered
}

func (t *thread) do(f func() error) error {
	done := make(chan error)
	t.work <- func() { done <- f() }
	return <-done
}

func (t *thread) close() { close(t.work); <-t.done }

// logWriter turns BIRD's lines into log entries and keeps the last ones.
type logWriter struct {
	log *slog.Logger
	mu  sync.Mutex
	old []string // at most keepLines
}

const keepLines = 20

var _ io.Writer = (*logWriter)(nil)

func (w *logWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for line := range strings.Lines(string(b)) {
		line = strings.TrimSpace(line)
		w.log.Warn("BIRD says", "line", line)
		w.old = append(w.old, line)
	}
	w.old = w.old[max(0, len(w.old)-keepLines):]
	return len(b), nil
}

func (w *logWriter) last() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Join(w.old, "; ")
}
