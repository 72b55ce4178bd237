package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	metaclient "github.com/cairnstore/cairn/meta/client"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

type upFlags struct {
	hosts     int
	metas     int
	stores    int
	slow      int
	storeSize string
	processes bool
}

func upCommand(c *cli) *cobra.Command {
	var f upFlags
	cmd := &cobra.Command{
		Use:   "up",
		Short: "Run a whole cluster on this machine, until Ctrl-C or `cairn down`",
		Long: `Run a whole cluster on this machine: metadata nodes and hosts, in one process or
one process each. It keeps its data in one directory; the next up finds it again.`,
		Example: `  cairn up
  cairn up --dir /srv/cairn --hosts 5
  cairn up --dir /srv/cairn --processes`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return up(cmd.Context(), c.localDir(), f) },
	}
	fl := cmd.Flags()
	fl.IntVar(&f.hosts, "hosts", 3, "hosts of a new cluster")
	fl.IntVar(&f.metas, "meta-nodes", 3, "metadata nodes of a new cluster: 1, 3 or 5")
	fl.IntVar(&f.stores, "stores", 1, "stores of each host of a new cluster, 1 to 64")
	fl.IntVar(&f.slow, "slow-stores", 0, "of these, how many are slow: for chunks nobody uses")
	fl.StringVar(&f.storeSize, "store-size", "64G", "size of each store in a new cluster; it takes up what is written only")
	fl.BoolVar(&f.processes, "processes", false, "one process per metadata node and host, restarted when it dies")
	return cmd
}

// runner is a cluster that is up, in either form.
type runner interface {
	stop() error
	failed() <-chan error // a part that cannot be had back
}

// minStoreSize is of a new cluster's stores: room for a chunk and the log around it.
const minStoreSize = 128 << 20

func up(ctx context.Context, dir string, f upFlags) (err error) {
	if f.hosts < 1 || f.hosts > 64 {
		return usagef("--hosts %d: a cluster on one machine has 1 to 64 hosts", f.hosts)
	}
	if f.metas != 1 && f.metas != 3 && f.metas != 5 {
		return usagef("--meta-nodes %d: 1, 3 or 5", f.metas)
	}
	if f.stores < 1 || f.stores > 64 {
		return usagef("--stores %d: a host has 1 to 64 stores", f.stores)
	}
	if f.slow < 0 || f.slow > f.stores {
		return usagef("--slow-stores %d: 0 to %d, the stores of a host", f.slow, f.stores)
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	began := time.Now()
	lock, err := lockCluster(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	l, err := openCluster(dir)
	if status.Of(err) == status.NotFound {
		size, serr := parseSize(f.storeSize)
		if serr != nil {
			return serr
		}
		if size < minStoreSize { // before anything is made that the next up would find
			return usagef("--store-size %s: a store of a new cluster has at least %s", f.storeSize, formatSize(minStoreSize))
		}
		l, err = createCluster(dir, f, size)
	}
	if err != nil {
		return err
	}
	for _, d := range []string{"run", "log"} {
		if err := os.MkdirAll(l.path(d), 0o700); err != nil {
			return err
		}
	}
	pid := pidFile(dir, "up")
	if err := os.WriteFile(pid, []byte(strconv.Itoa(os.Getpid())+"\n"), 0o600); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(pid)) }()
	var r runner
	if f.processes {
		r, err = superviseCluster(ctx, l)
	} else {
		r, err = embedCluster(ctx, l)
	}
	if err != nil {
		return err
	}
	printReady(l, time.Since(began))
	select {
	case <-ctx.Done():
		say("stopping")
	case err = <-r.failed():
	}
	return errors.Join(err, stopVMs(l), r.stop())
}

// stopVMs shuts down the VMs of a cluster that is going down: without their
// disks they would only hang.
func stopVMs(l *localCluster) (err error) {
	s := &session{meta: metaclient.New(metaclient.Config{Addrs: l.metaAddrs(), Who: who()}), dir: l.dir}
	defer func() { err = errors.Join(err, s.meta.Close()) }()
	ctx, cancel := context.WithTimeout(context.Background(), cliWait)
	defer cancel()
	rep, err := s.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Vms{Vms: true}})
	if err != nil {
		return nil // no metadata, no VMs to be known: the hosts are stopped all the same
	}
	for _, vm := range rep.Vms {
		if vm.Host == "" {
			continue
		}
		err := s.stopVM(ctx, vm.Name, false)
		if err != nil {
			say("VM %s: %v", vm.Name, err)
		}
	}
	return nil
}

// printReady says that the cluster can be used, and how.
func printReady(l *localCluster, took time.Duration) {
	fmt.Printf("cairn is ready: %d metadata nodes, %d hosts in %s (%.1f s)\n", len(l.Meta), len(l.Hosts), l.dir, took.Seconds())
	flag := ""
	if l.dir != defaultDir() {
		flag = " --dir " + l.dir
	}
	say("\nNext, in another terminal:\n  cairn%[1]s volume create v --size 1G\n  cairn%[1]s volume attach v\n  cairn%[1]s status\n\nCtrl-C, or `cairn%[1]s down`, stops it; the data stays.", flag)
}

// embedded is a cluster in this process. Its parts know each other by address
// only, as they would on different machines.
type embedded struct {
	metas []*metad
	hosts []*hostd
	fail  chan error
	log   *os.File
}

func embedCluster(ctx context.Context, l *localCluster) (_ runner, err error) {
	e := &embedded{fail: make(chan error, len(l.Meta))}
	if e.log, err = os.OpenFile(l.path("log", "cairn.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600); err != nil {
		return nil, err
	}
	log := slog.New(slog.NewTextHandler(e.log, nil))
	e.metas, err = startAll(len(l.Meta), func(i int) (*metad, error) {
		m, err := startMeta(l.metaConfig(i), log)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", l.Meta[i].ID, err)
		}
		return m, nil
	})
	if err == nil {
		e.hosts, err = startAll(len(l.Hosts), func(i int) (*hostd, error) {
			cfg := l.hostConfig(i)
			if err := cfg.check(); err != nil {
				return nil, err
			}
			h, err := startHost(ctx, cfg, log)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", cfg.Name, err)
			}
			return h, nil
		})
	}
	if err != nil {
		return nil, errors.Join(err, e.stop())
	}
	for _, m := range e.metas {
		go func() {
			<-m.done
			e.fail <- status.Errorf(status.Internal, "a metadata node stopped: %s says why", e.log.Name())
		}()
	}
	return e, nil
}

// startAll starts n parts at once; on failure the others are still returned.
func startAll[T any](n int, start func(i int) (*T, error)) ([]*T, error) {
	var wg sync.WaitGroup
	out, errs := make([]*T, n), make([]error, n)
	for i := range n {
		wg.Add(1)
		go func() { defer wg.Done(); out[i], errs[i] = start(i) }()
	}
	wg.Wait()
	var running []*T
	for _, p := range out {
		if p != nil {
			running = append(running, p)
		}
	}
	return running, errors.Join(errs...)
}

func (e *embedded) failed() <-chan error { return e.fail }

func (e *embedded) stop() error {
	var mu sync.Mutex
	var errs []error
	var wg sync.WaitGroup
	for _, h := range e.hosts {
		wg.Add(1)
		go func() {
			defer wg.Done()
			err := h.close()
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, err)
		}()
	}
	wg.Wait()
	for _, m := range e.metas {
		errs = append(errs, m.close())
	}
	return errors.Join(append(errs, e.log.Close())...)
}

func downCommand(c *cli) *cobra.Command {
	return &cobra.Command{
		Example: "  cairn down\n  cairn down --dir /srv/cairn",
		Use:     "down",
		Short:   "Stop the cluster of a directory; its data stays",
		Args:    cobra.NoArgs,
		RunE:    func(cmd *cobra.Command, _ []string) error { return down(cmd.Context(), c.localDir()) },
	}
}

// down stops the running `cairn up` of a directory and waits until it is gone.
func down(ctx context.Context, dir string) error {
	if _, err := openCluster(dir); err != nil {
		return err
	}
	pid, err := readPid(pidFile(dir, "up"))
	if err != nil {
		return err
	}
	if pid == 0 || !isCairn(pid) {
		say("the cluster in %s is not up", dir)
		return nil
	}
	if err := unix.Kill(pid, unix.SIGTERM); err != nil {
		return fmt.Errorf("cannot stop process %d: %w", pid, err)
	}
	t := time.NewTicker(20 * time.Millisecond)
	defer t.Stop()
	deadline := time.After(60 * time.Second)
	for {
		lock, err := lockCluster(dir)
		if err == nil {
			return lock.Close()
		}
		if status.Of(err) != status.Held {
			return err
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return ctx.Err()
		case <-deadline:
			return status.Errorf(status.Timeout, "the cluster in %s (process %d) is still stopping after 60 s: %s says what it waits for", dir, pid, filepath.Join(dir, "log"))
		}
	}
}

// isCairn reports whether a process runs this program: a pid in a file may be
// somebody else's by now.
func isCairn(pid int) bool {
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	return err == nil && strings.HasPrefix(filepath.Base(exe), "cairn")
}
