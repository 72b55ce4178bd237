// Package cluster runs a real cairn cluster, one process for each metadata node
// and host, and breaks it: what the chaos tests and the benchmark stand on.
//
// Duty: start, find, kill, pause, hold and stop the processes of one cluster,
// drive its command line, and leave nothing behind. Floor: F5. It knows cairn
// by its command line alone and judges nothing: chaos/check does.
package cluster

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Config says which cluster to run. Zero fields get the defaults named.
type Config struct {
	Bin   string   // the cairn binary (the environment's CAIRN_BIN)
	Dir   string   // the cluster's directory; empty: a fresh one, removed by Close
	Hosts int      // (3)
	Args  []string // further arguments of `cairn up`
}

// Waits of the cluster's life. They bound hangs; nothing is slow on purpose.
const (
	startMaxWait = 60 * time.Second
	stopMaxWait  = 30 * time.Second
	pollEvery    = 25 * time.Millisecond
)

// Cluster is a running cluster. Its methods may be called from several
// goroutines; Start, Up, Down and Close from one.
type Cluster struct {
	cfg Config
	own bool // the directory is ours to remove

	up *upProcess // nil: not up
}

// Start starts a cluster, or starts again one that was stopped, and returns
// when it is ready.
func Start(ctx context.Context, cfg Config) (*Cluster, error) {
	if cfg.Bin == "" {
		cfg.Bin = os.Getenv("CAIRN_BIN")
	}
	if cfg.Bin == "" {
		return nil, errors.New("no cairn binary named: set CAIRN_BIN, as `make test-int` does")
	}
	// As /proc shows it, which is how a node's process is known again.
	bin, err := filepath.EvalSymlinks(cfg.Bin)
	if err == nil {
		bin, err = filepath.Abs(bin)
	}
	if err != nil {
		return nil, fmt.Errorf("there is no cairn binary: %w; `make build` makes bin/cairn", err)
	}
	cfg.Bin = bin
	if cfg.Hosts == 0 {
		cfg.Hosts = 3
	}
	c := &Cluster{cfg: cfg, own: cfg.Dir == ""}
	if c.own {
		// Short, because unix sockets live in it and their paths are limited to 107 bytes.
		if c.cfg.Dir, err = os.MkdirTemp("", "cairn-"); err != nil {
			return nil, fmt.Errorf("no directory for the cluster: %w", err)
		}
	}
	if err := c.Up(ctx); err != nil {
		return nil, errors.Join(err, c.removeDir())
	}
	return c, nil
}

// Dir is the cluster's directory.
func (c *Cluster) Dir() string { return c.cfg.Dir }

// Up runs `cairn up` on the directory and waits for its ready line. Start does
// it; after Down it may be done again.
func (c *Cluster) Up(ctx context.Context) error {
	args := append([]string{"up", "--processes", "--dir", c.cfg.Dir, "--hosts", strconv.Itoa(c.cfg.Hosts)}, c.cfg.Args...)
	// cairn keeps its nodes' logs in the same folder, and minds no other file there.
	if err := os.MkdirAll(filepath.Join(c.cfg.Dir, "log"), 0o700); err != nil {
		return fmt.Errorf("no directory for the cluster's logs: %w", err)
	}
	up, err := startUp(c.cfg.Bin, args, filepath.Join(c.cfg.Dir, "log", "up.log"))
	if err != nil {
		return err
	}
	select {
	case <-up.ready:
		c.up = up
		return nil
	case <-ctx.Done():
		err = ctx.Err()
	case <-up.gone:
		err = fmt.Errorf("`cairn up` ended before it was ready: %v\n%s", up.err, c.Tail())
	case <-time.After(startMaxWait):
		err = fmt.Errorf("`cairn up` was not ready in %v\n%s", startMaxWait, c.Tail())
	}
	return errors.Join(err, up.stop(), c.sweep())
}

// Down runs `cairn down` and waits until no process of the cluster is left.
// What is left is killed, and that is an error.
func (c *Cluster) Down() error {
	if c.up == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), stopMaxWait)
	defer cancel()
	_, err := c.Cairn(ctx, "down")
	if err == nil {
		select {
		case <-c.up.gone:
			if c.up.err != nil {
				err = fmt.Errorf("`cairn up` ended badly: %w", c.up.err)
			}
		case <-ctx.Done():
			err = fmt.Errorf("`cairn up` still runs %v after `cairn down`", stopMaxWait)
		}
	}
	if err != nil {
		err = fmt.Errorf("%w\n%s", err, c.Tail())
	}
	err = errors.Join(err, c.up.stop(), c.sweep())
	c.up = nil
	return err
}

// Close stops the cluster and removes the directory if Start made it.
func (c *Cluster) Close() error {
	return errors.Join(c.Down(), c.removeDir())
}

func (c *Cluster) removeDir() error {
	if !c.own {
		return nil
	}
	if err := os.RemoveAll(c.cfg.Dir); err != nil {
		return fmt.Errorf("the cluster's directory cannot be removed: %w", err)
	}
	return nil
}

// sweep kills what is left of the cluster's processes; finding any is an error.
func (c *Cluster) sweep() error {
	var errs []error
	for round := 0; ; round++ {
		left, err := c.processes()
		if err != nil {
			return err
		}
		if len(left) == 0 {
			return errors.Join(errs...)
		}
		if round == 0 {
			errs = append(errs, fmt.Errorf("the cluster in %s left processes behind: %v", c.cfg.Dir, left))
		}
		for _, p := range left {
			if err := kill(p.pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
				return errors.Join(append(errs, err)...)
			}
		}
		time.Sleep(pollEvery)
	}
}

// process is a running process of this cluster.
type process struct {
	pid  int
	args string
}

func (p process) String() string { return fmt.Sprintf("%d (%s)", p.pid, p.args) }

// processes finds, in /proc, whatever holds our directory in its arguments,
// guests included.
func (c *Cluster) processes() ([]process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("the processes cannot be listed: %w", err)
	}
	var out []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		if args := arguments(pid); hasPath(args, c.cfg.Dir) {
			out = append(out, process{pid, args})
		}
	}
	return out, nil
}

// arguments are a process's; none when it has ended, also while its parent has
// not yet asked how.
func arguments(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(strings.ReplaceAll(string(b), "\x00", " "))
}

// hasPath tells whether dir, or something in it, is among the arguments.
func hasPath(args, dir string) bool {
	for at := 0; ; {
		i := strings.Index(args[at:], dir)
		if i < 0 {
			return false
		}
		at += i + len(dir)
		if at == len(args) || strings.ContainsRune("/ ,", rune(args[at])) {
			return true
		}
	}
}

// tailBytes bounds what Tail shows of each log.
const tailBytes = 4 << 10

// Tail is the end of every log of the cluster, for a failure's account.
func (c *Cluster) Tail() string {
	logs, err := filepath.Glob(filepath.Join(c.cfg.Dir, "log", "*.log"))
	if err != nil {
		return err.Error()
	}
	sort.Strings(logs)
	var b strings.Builder
	for _, name := range logs {
		text, err := os.ReadFile(name)
		if err != nil {
			fmt.Fprintf(&b, "--- %s: %v\n", filepath.Base(name), err)
			continue
		}
		if n := len(text) - tailBytes; n > 0 {
			text = text[n:]
		}
		fmt.Fprintf(&b, "--- %s\n%s\n", filepath.Base(name), strings.TrimRight(string(text), "\n"))
	}
	return b.String()
}

// upProcess is one run of `cairn up`.
type upProcess struct {
	pid   int
	ready chan struct{} // closed at the ready line
	gone  chan struct{} // closed when it ended; err is set before
	err   error
}

// startUp starts `cairn up`. It dies with us however we end (Pdeathsig). The
// kernel means the thread that started it, so one thread is kept for it.
func startUp(bin string, args []string, log string) (*upProcess, error) {
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("no log for `cairn up`: %w", err)
	}
	u := &upProcess{ready: make(chan struct{}), gone: make(chan struct{})}
	cmd := exec.Command(bin, args...)
	cmd.Stderr = f
	// A group of its own, so that Ctrl-C reaches us alone and we stop it in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		started <- nil
		scanned := u.scan(bufio.NewScanner(out), f)
		u.err = errors.Join(cmd.Wait(), scanned, f.Close())
		close(u.gone)
	}()
	if err := <-started; err != nil {
		return nil, errors.Join(fmt.Errorf("`cairn up` does not start: %w", err), f.Close())
	}
	u.pid = cmd.Process.Pid
	return u, nil
}

// scan copies stdout to the log and notices the ready line.
func (u *upProcess) scan(s *bufio.Scanner, log *os.File) error {
	seen := false
	for s.Scan() {
		if _, err := fmt.Fprintln(log, s.Text()); err != nil {
			return err
		}
		if !seen && strings.Contains(s.Text(), "ready") {
			seen = true
			close(u.ready)
		}
	}
	return s.Err()
}

// stop ends it for good if it still runs.
func (u *upProcess) stop() error {
	select {
	case <-u.gone:
		return nil
	default:
	}
	if err := kill(u.pid, syscall.SIGTERM); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	select {
	case <-u.gone:
		return nil
	case <-time.After(stopMaxWait):
	}
	if err := kill(u.pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	<-u.gone
	return fmt.Errorf("`cairn up` (process %d) did not stop on SIGTERM in %v", u.pid, stopMaxWait)
}

func kill(pid int, sig syscall.Signal) error {
	if err := syscall.Kill(pid, sig); err != nil {
		return fmt.Errorf("signal %v to process %d: %w", sig, pid, err)
	}
	return nil
}
