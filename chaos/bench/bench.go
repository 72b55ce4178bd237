// Package bench measures a cairn cluster beside what a user would pick instead,
// on the same machine and file system, in one go.
//
// Duty: interleaved runs of the same fio jobs on both sides, medians, processor
// time per I/O, the write stall at a server's death, and the table of it all.
// Floor: F5. It judges no correctness: chaos/check does.
package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// Config says what to measure. Zero fields get the defaults named.
type Config struct {
	Bin       string        // the cairn binary
	Dir       string        // where the disks of both sides live; empty: a fresh directory of TMPDIR, removed at the end
	Out       io.Writer     // the result
	Talk      io.Writer     // progress (none)
	JSON      bool          // the result as JSON instead of a table
	Rounds    int           // rounds of every job on every side; medians are shown (3)
	Each      time.Duration // length of one run of one job (5 s)
	SizeBytes uint64        // size of the disks (1 GiB)
}

func (c *Config) defaults() error {
	if c.Bin == "" {
		return errors.New("the benchmark needs the cairn binary's path")
	}
	if c.Out == nil {
		return errors.New("the benchmark has nowhere to print its result")
	}
	if c.Talk == nil {
		c.Talk = io.Discard
	}
	if c.Rounds == 0 {
		c.Rounds = 3
	}
	if c.Each == 0 {
		c.Each = 5 * time.Second
	}
	if c.SizeBytes == 0 {
		c.SizeBytes = 1 << 30
	}
	for _, need := range []struct{ cmd, pkg string }{{"fio", "fio"}, {"qemu-nbd", "qemu-utils"}} {
		if _, err := exec.LookPath(need.cmd); err != nil {
			return fmt.Errorf("the benchmark needs %s: `apt-get install %s` brings it", need.cmd, need.pkg)
		}
	}
	return nil
}

// Run measures and prints. A missed target is part of the result, not an
// error. Nothing is left running, and no file.
func Run(ctx context.Context, cfg Config) (err error) {
	if err := cfg.defaults(); err != nil {
		return err
	}
	dir, err := os.MkdirTemp(cfg.Dir, "cairn-bench-")
	if err != nil {
		return fmt.Errorf("no directory for the disks: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	b := &bench{cfg: cfg, samples: map[string]map[string][]sample{}}
	if err := b.measure(ctx, dir); ctx.Err() != nil {
		return fmt.Errorf("the benchmark was interrupted: %w", err)
	} else if err != nil {
		return err
	}
	return b.result().print(cfg.Out, cfg.JSON)
}

// bench is one benchmark in progress.
type bench struct {
	cfg     Config
	samples map[string]map[string][]sample // job, then side
	calm    []float64                      // longest write of each run without a kill, µs
	stalls  []float64                      // longest write of each run with a kill, µs
}

// sideCairn and sideReference are the keys of the two sides.
const (
	sideCairn     = "cairn"
	sideReference = "qemu-nbd"
)

func (b *bench) measure(ctx context.Context, dir string) (err error) {
	b.talk("starting qemu-nbd and a cluster of 3 metadata nodes and 3 hosts")
	qemu, err := startQemu(ctx, dir, b.cfg.SizeBytes)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, qemu.close()) }()
	cairn, err := startCairn(ctx, b.cfg, filepath.Join(dir, "c"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cairn.close()) }()
	sides := map[string]side{sideCairn: cairn, sideReference: qemu}
	for _, name := range []string{sideReference, sideCairn} {
		b.talk("filling %s", sides[name].label())
		if _, err := b.run(ctx, sides[name], fill, 0); err != nil {
			return err
		}
	}
	if err := b.rounds(ctx, sides); err != nil {
		return err
	}
	for round := range b.cfg.Rounds {
		b.talk("kill -9 of %s, %d of %d", victimHost, round+1, b.cfg.Rounds)
		if err := b.killRound(ctx, cairn); err != nil {
			return err
		}
	}
	return nil
}

// rounds runs every job on both sides in turn, so that whatever else the
// machine does falls on both; who goes first changes every round.
func (b *bench) rounds(ctx context.Context, sides map[string]side) error {
	order := []string{sideReference, sideCairn}
	for round := range b.cfg.Rounds {
		for _, j := range jobs {
			b.talk("round %d of %d: %s", round+1, b.cfg.Rounds, j.name)
			for _, name := range order {
				s, err := b.run(ctx, sides[name], j, b.cfg.Each)
				if err != nil {
					return err
				}
				if b.samples[j.name] == nil {
					b.samples[j.name] = map[string][]sample{}
				}
				b.samples[j.name][name] = append(b.samples[j.name][name], s)
			}
		}
		order[0], order[1] = order[1], order[0]
	}
	return nil
}

func (b *bench) run(ctx context.Context, s side, j job, d time.Duration) (sample, error) {
	pids, err := s.pids()
	if err != nil {
		return sample{}, err
	}
	return runFio(ctx, j, s.uri(), b.cfg.SizeBytes, d, pids)
}

// killJob is the load during a kill: enough in flight that a stall is seen by
// some write, little enough that the queue itself is none.
var killJob = job{name: "random write, depth 4", rw: "randwrite", block: "4k", depth: 4}

// killAfter is how long the load runs before the kill, within a run of killFor.
const (
	killAfter = time.Second
	killFor   = 4 * time.Second
)

// catchUpMaxWait bounds the killed server's way back.
const catchUpMaxWait = 2 * time.Minute

// killRound measures the longest write without a kill, then with one, and
// waits until the killed server is in-sync again.
func (b *bench) killRound(ctx context.Context, c *cairnSide) (err error) {
	calm, err := runFio(ctx, killJob, c.uri(), b.cfg.SizeBytes, killFor, nil)
	if err != nil {
		return err
	}
	if err := c.Hold(victimHost); err != nil {
		return err
	}
	killed := make(chan error, 1)
	timer := time.AfterFunc(killAfter, func() { killed <- c.Kill(victimHost) })
	broken, err := runFio(ctx, killJob, c.uri(), b.cfg.SizeBytes, killFor, nil)
	if !timer.Stop() {
		err = errors.Join(err, <-killed)
	}
	if err = errors.Join(err, c.Release(victimHost)); err != nil {
		return err
	}
	b.calm = append(b.calm, calm.LongestUs)
	b.stalls = append(b.stalls, broken.LongestUs)
	ctx, cancel := context.WithTimeout(ctx, catchUpMaxWait)
	defer cancel()
	return c.WaitInSync(ctx, volumeName)
}

func (b *bench) talk(format string, args ...any) {
	fmt.Fprintf(b.cfg.Talk, format+"\n", args...)
}
