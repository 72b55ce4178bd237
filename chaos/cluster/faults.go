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
	"time"

	"github.com/cairnstore/cairn/chaos/fault"
	"github.com/cairnstore/cairn/proto/status"
)

var _ fault.Cluster = (*Cluster)(nil)

// nodes reaches the processes through their pid and hold files.
func (c *Cluster) nodes() fault.Processes {
	return fault.Processes{Dir: c.cfg.Dir, Exe: c.cfg.Bin}
}

// Names lists the nodes of a kind in order, running or not: a pid file goes
// with its process, a node's folder stays.
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

// Kill ends a node's process with SIGKILL and returns when it is gone. Its
// supervisor starts it again at once unless it is held.
func (c *Cluster) Kill(name string) error { return c.nodes().Kill(name) }

// Pause stops a node's process and returns when it goes on, d later.
func (c *Cluster) Pause(name string, d time.Duration) error { return c.nodes().Pause(name, d) }

// Hold keeps a node that dies from being started again.
func (c *Cluster) Hold(name string) error { return c.nodes().Hold(name) }

// Release ends a Hold.
func (c *Cluster) Release(name string) error { return c.nodes().Release(name) }

// MetaLeader is the name of the metadata leader; Unavailable while there is
// none, or none that can be asked.
func (c *Cluster) MetaLeader() (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), commandMaxWait)
	defer cancel()
	nodes, err := c.MetaNodes(ctx)
	if err != nil {
		return "", status.Errorf(status.Unavailable, "the metadata leader is not known: %w", err)
	}
	for _, n := range nodes {
		if n.Leader {
			return n.ID, nil
		}
	}
	return "", status.Errorf(status.Unavailable, "the metadata nodes have no leader now")
}

// KillAll ends every node's process at about the same instant, held, and
// returns when all are gone: with nobody left to answer, it is as if the
// machine's processes had died together.
func (c *Cluster) KillAll() error {
	names := append(c.Names(fault.KindHost), c.Names(fault.KindMeta)...)
	for _, name := range names {
		if err := c.Hold(name); err != nil {
			return err
		}
	}
	return c.killAtOnce(names)
}

// killAtOnce kills nodes at about the same instant; one that is down already
// is left so.
func (c *Cluster) killAtOnce(names []string) error {
	died := make(chan error, len(names))
	for _, name := range names {
		go func() { died <- c.Kill(name) }()
	}
	var errs []error
	for range names {
		if err := <-died; err != nil && !errors.Is(err, status.NotFound) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// ReleaseAll ends every Hold.
func (c *Cluster) ReleaseAll() error {
	var errs []error
	for _, name := range append(c.Names(fault.KindMeta), c.Names(fault.KindHost)...) {
		errs = append(errs, c.Release(name))
	}
	return errors.Join(errs...)
}

// Pids are all processes of the cluster that run now, `cairn up` first.
func (c *Cluster) Pids() ([]int, error) {
	pids := []int{c.up.pid}
	for _, name := range append(c.Names(fault.KindMeta), c.Names(fault.KindHost)...) {
		b, err := os.ReadFile(filepath.Join(c.cfg.Dir, "run", name+".pid"))
		if errors.Is(err, os.ErrNotExist) {
			continue // it is down
		}
		if err != nil {
			return nil, fmt.Errorf("%s's process is not known: %w", name, err)
		}
		pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
		if err != nil || !hasPath(arguments(pid), filepath.Join(c.cfg.Dir, name)) {
			continue // the file is being written, or outlives its process for a moment
		}
		pids = append(pids, pid)
	}
	return pids, nil
}
