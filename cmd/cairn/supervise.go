package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"sync"
	"syscall"
	"time"

	nbdserver "github.com/cairnstore/cairn/nbd/server"
	"github.com/cairnstore/cairn/proto/status"
)

const (
	livedWell    = 500 * time.Millisecond // a child that lived so long and died is started again at once
	restartAfter = 100 * time.Millisecond // one that did not, after this
	restartCap   = 5 * time.Second        // and more slowly while it keeps dying before it serves
	readyWait    = 30 * time.Second
	stopWait     = 30 * time.Second
)

// supervisor runs one process per node and starts again what dies, unless
// run/NAME.hold is there.
type supervisor struct {
	metas []*child
	hosts []*child
	fail  chan error // nothing fails for good: a child is started again
}

// child is one supervised process.
type child struct {
	name   string
	args   []string
	l      *localCluster
	ctx    context.Context // its end: do not start it again
	leave  context.CancelFunc
	ready  chan struct{} // closed when it was ready for the first time
	once   sync.Once
	done   chan struct{} // closed when it is gone and stays gone
	killed bool          // it did not end by itself; set before done is closed

	// listen opens the socket the process is given; nil: none. It stays open while
	// the process is started again: clients wait in its queue meanwhile.
	listen func() (net.Listener, error)
	socket net.Listener // open while the process is not held
}

func superviseCluster(ctx context.Context, l *localCluster) (runner, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("cannot find this program to start it again: %w", err)
	}
	s := &supervisor{fail: make(chan error)}
	add := func(name, kind string, cfg any, listen func() (net.Listener, error)) (*child, error) {
		path := l.path(name, "config.toml")
		if err := os.MkdirAll(l.path(name), 0o755); err != nil {
			return nil, err
		}
		if err := writeConfig(path, cfg); err != nil {
			return nil, err
		}
		c := &child{name: name, args: []string{exe, kind, "run", "--config", path}, l: l, ready: make(chan struct{}), done: make(chan struct{}), listen: listen}
		c.ctx, c.leave = context.WithCancel(context.Background()) // stop ends it, in order
		go c.supervise()
		return c, nil
	}
	for i, m := range l.Meta {
		c, err := add(m.ID, "meta", l.metaConfig(i), nil)
		if err != nil {
			return nil, errors.Join(err, s.stop())
		}
		s.metas = append(s.metas, c)
	}
	for i, h := range l.Hosts {
		cfg := l.hostConfig(i)
		c, err := add(h.Name, "host", cfg, cfg.listenNBD)
		if err != nil {
			return nil, errors.Join(err, s.stop())
		}
		s.hosts = append(s.hosts, c)
	}
	deadline := time.After(readyWait)
	for _, c := range append(append([]*child(nil), s.metas...), s.hosts...) {
		select {
		case <-c.ready:
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), s.stop())
		case <-deadline:
			return nil, errors.Join(status.Errorf(status.Timeout, "%s is not ready after %v: %s says why", c.name, readyWait, l.path("log", c.name+".log")), s.stop())
		}
	}
	return s, nil
}

func (s *supervisor) failed() <-chan error { return s.fail }

// stop ends the hosts first: they flush and let go of their leases.
func (s *supervisor) stop() error {
	return errors.Join(stopChildren(s.hosts), stopChildren(s.metas))
}

// stopChildren ends processes for good, all at once.
func stopChildren(cs []*child) error {
	errs := make([]error, len(cs))
	var wg sync.WaitGroup
	for i, c := range cs {
		wg.Add(1)
		go func() { defer wg.Done(); errs[i] = c.stop() }()
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (c *child) holdFile() string { return c.l.path("run", c.name+".hold") }

// stop asks the process to end and waits for it; one that does not is killed.
func (c *child) stop() error {
	c.leave()
	<-c.done
	if c.killed {
		return status.Errorf(status.Timeout, "%s did not stop in %v and was killed: nothing acknowledged is lost, the next start recovers", c.name, stopWait)
	}
	return nil
}

// supervise starts the process again and again until it is to be left alone.
func (c *child) supervise() {
	defer close(c.done)
	ctx, wait := c.ctx, restartAfter
	if err := os.Remove(c.holdFile()); err != nil && !errors.Is(err, os.ErrNotExist) {
		say("%s: %v", c.name, err)
	}
	for ctx.Err() == nil {
		if _, err := os.Stat(c.holdFile()); err == nil {
			c.closeSocket() // it is to look dead
			pause(ctx, restartAfter/2)
			continue
		}
		began := time.Now()
		served, err := c.runOnce()
		var now time.Duration
		now, wait = restartWaits(wait, time.Since(began), served)
		if _, held := os.Stat(c.holdFile()); held != nil && ctx.Err() == nil {
			say("%s ended (%v): started again", c.name, err)
			pause(ctx, now)
		}
	}
	c.closeSocket()
}

// restartWaits says how long to wait before a child that lived for so long is
// started again, and what the next wait is measured by. One that served is not
// what is wrong: whoever kills it again and again must not make its clients wait
// longer and longer.
func restartWaits(wait, lived time.Duration, served bool) (now, next time.Duration) {
	switch {
	case lived > livedWell:
		wait = 0
	case served:
		wait = min(wait, restartAfter)
	}
	return wait, min(max(2*wait, restartAfter), restartCap)
}

// openSocket opens the socket the process is given, if it is not open, and
// returns what the process needs of it.
func (c *child) openSocket() (*os.File, []string, error) {
	if c.listen == nil {
		return nil, nil, nil
	}
	if c.socket == nil {
		l, err := c.listen()
		if err != nil {
			return nil, nil, err
		}
		c.socket = l
	}
	return nbdserver.Bequeath(c.socket, nbdSocketName)
}

func (c *child) closeSocket() {
	if c.socket == nil {
		return
	}
	if err := c.socket.Close(); err != nil {
		say("%s: close its socket: %v", c.name, err)
	}
	c.socket = nil
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// runOnce runs the process to its end, and says whether it came to serve.
func (c *child) runOnce() (served bool, err error) {
	logf, err := os.OpenFile(c.l.path("log", c.name+".log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, logf.Close()) }()
	cmd := exec.CommandContext(c.ctx, c.args[0], c.args[1:]...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = stopWait // then it is killed
	cmd.Stderr = logf
	given, env, err := c.openSocket()
	if err != nil {
		return false, err
	}
	if given != nil {
		cmd.ExtraFiles, cmd.Env = []*os.File{given}, append(os.Environ(), env...)
		defer func() { err = errors.Join(err, given.Close()) }()
	}
	// Ctrl-C goes to this process alone, which ends the others in order; if it
	// is killed, so are they.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return false, err
	}
	started := make(chan error, 1)
	waited := make(chan error, 1)
	go func() { // Pdeathsig is sent when the starting thread ends: it stays here
		runtime.LockOSThread()
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		started <- nil
		served = c.watchReady(out)
		waited <- cmd.Wait()
	}()
	if err := <-started; err != nil {
		return false, err
	}
	pid := pidFile(c.l.dir, c.name)
	if err := os.WriteFile(pid, []byte(strconv.Itoa(cmd.Process.Pid)+"\n"), 0o600); err != nil {
		return false, errors.Join(err, cmd.Process.Kill(), <-waited)
	}
	err = <-waited
	ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
	c.killed = c.ctx.Err() != nil && ok && ws.Signal() == syscall.SIGKILL
	return served, errors.Join(err, os.Remove(pid))
}

// watchReady waits for the line a daemon prints when it serves, and reads on so
// that it never blocks. It says whether the line came.
func (c *child) watchReady(out io.Reader) (served bool) {
	sc := bufio.NewScanner(out)
	for sc.Scan() {
		if sc.Text() == "ready" {
			served = true
			c.once.Do(func() { close(c.ready) })
		}
	}
	return served
}
