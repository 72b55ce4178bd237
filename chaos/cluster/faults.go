package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Names lists the nodes of a kind, "host" or "meta", in order, running or not.
func (c *Cluster) Names(kind string) []string {
	dirs, err := filepath.Glob(filepath.Join(c.cfg.Dir, kind+"-*"))
	if err != nil {
		return nil // the pattern is ours and right
	}
	var out []string
	for _, d := range dirs {
		out = append(out, filepath.Base(d))
	}
	sort.Strings(out)
	return out
}

func (c *Cluster) run(name string) string { return filepath.Join(c.cfg.Dir, "run", name) }

// errNotRunning says that a node has no live process right now.
var errNotRunning = errors.New("it is not running")

// Pid is the process of a node that runs now. A pid file outlives its process
// for a moment, and a number may be somebody else's by then: the arguments tell.
func (c *Cluster) Pid(name string) (int, error) {
	b, err := os.ReadFile(c.run(name + ".pid"))
	if errors.Is(err, os.ErrNotExist) {
		return 0, fmt.Errorf("%s: %w", name, errNotRunning)
	}
	if err != nil {
		return 0, fmt.Errorf("%s's process is not known: %w", name, err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || !hasPath(arguments(pid), filepath.Join(c.cfg.Dir, name)) {
		return 0, fmt.Errorf("%s: %w", name, errNotRunning) // being written, or just ended
	}
	return pid, nil
}

// Pids are all processes of the cluster that run now, `cairn up` first.
func (c *Cluster) Pids() ([]int, error) {
	pids := []int{c.up.pid}
	for _, name := range append(c.Names("meta"), c.Names("host")...) {
		pid, err := c.Pid(name)
		if errors.Is(err, errNotRunning) {
			continue
		}
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// Kill ends a node's process with SIGKILL. Its supervisor starts it again at
// once unless it is held. A node that is not running is left so.
func (c *Cluster) Kill(name string) error {
	pid, err := c.Pid(name)
	if errors.Is(err, errNotRunning) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return err
	}
	return nil
}

// Pause stops a node's process with SIGSTOP and lets it go on after d. It
// returns at once; Down waits for the end of every pause.
func (c *Cluster) Pause(name string, d time.Duration) error {
	pid, err := c.Pid(name)
	if errors.Is(err, errNotRunning) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := kill(pid, syscall.SIGSTOP); err != nil {
		if errors.Is(err, syscall.ESRCH) {
			return nil
		}
		return err
	}
	c.timers.Add(1)
	time.AfterFunc(d, func() {
		defer c.timers.Done()
		if err := kill(pid, syscall.SIGCONT); err != nil && !errors.Is(err, syscall.ESRCH) {
			c.cfg.Log("%s stays paused: %v", name, err)
		}
	})
	return nil
}

// Hold keeps a node that dies from being started again.
func (c *Cluster) Hold(name string) error {
	if err := os.WriteFile(c.run(name+".hold"), nil, 0o600); err != nil {
		return fmt.Errorf("%s cannot be held: %w", name, err)
	}
	return nil
}

// Release ends a Hold.
func (c *Cluster) Release(name string) error {
	if err := os.Remove(c.run(name + ".hold")); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s cannot be released: %w", name, err)
	}
	return nil
}

// MetaLeader is the name of the metadata leader; an error while there is none.
func (c *Cluster) MetaLeader() (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), commandMaxWait)
	defer cancel()
	nodes, err := c.MetaNodes(ctx)
	if err != nil {
		return "", err
	}
	for _, n := range nodes {
		if n.Leader {
			return n.ID, nil
		}
	}
	return "", errors.New("the metadata nodes have no leader now")
}
