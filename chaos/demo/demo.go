// Package demo shows the main job of cairn, start to finish, on one machine: a
// cluster of real processes, a real guest whose disk is a replicated volume,
// and processes killed under it.
//
// Duty: the steps, what each proves, and the table at the end. Floor: F5. It
// uses the command line as an admin would; it measures nothing finely
// (chaos/bench does) and judges only what the guest itself sees.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/cairnstore/cairn/chaos/cluster"
	"github.com/cairnstore/cairn/chaos/guest"
)

// Config says how to run it.
type Config struct {
	Bin string    // the cairn binary
	Out io.Writer // progress and the table
}

// demo is a run under way.
type demo struct {
	cfg   Config
	dir   string
	img   guest.Image
	c     *cluster.Cluster
	con   *guest.Console
	began time.Time
	step  int
	table [][3]string // what happened, how long, evidence
}

const (
	vmName   = "demo"
	diskName = "disk"
	seedName = "seed"
)

// Run runs the demo and leaves nothing behind.
func Run(ctx context.Context, cfg Config) (err error) {
	d := &demo{cfg: cfg, began: time.Now()}
	if d.dir, err = os.MkdirTemp("", "cairn-demo-"); err != nil {
		return fmt.Errorf("no directory for the demo: %w", err)
	}
	defer func() { err = errors.Join(err, d.close()) }()
	for _, s := range []struct {
		what string
		run  func(context.Context) (string, error)
	}{
		{"the guest's kernel and initial RAM disk", d.prepare},
		{"a cluster: 3 metadata nodes and 3 hosts, a process each", d.start},
		{"import a file-system image, create an 8 GiB volume with 3 replicas", d.volumes},
		{"boot a guest on host-1 whose disk is the volume", d.boot},
		{"in the guest: mkfs.ext4, copy files in, fsync, sha256", d.fill},
		{"kill -9 host-2, a chunk server, while the guest writes", d.killPeer},
		{"kill -9 host-1, the guest's own host process", d.killOwn},
		{"grow the volume to 12 GiB under the running guest", d.grow},
		{"stop the guest, start it on host-3, verify every sha256", d.move},
		{"bring host-2 back: it catches up", d.rejoin},
		{"remove files, fstrim in the guest: physical bytes fall", d.trim},
		{"stop the guest", d.stop},
	} {
		if err := d.do(ctx, s.what, s.run); err != nil {
			return err
		}
	}
	return d.print(ctx)
}

// do runs one step and notes how long it took.
func (d *demo) do(ctx context.Context, what string, run func(context.Context) (string, error)) error {
	d.step++
	d.say("[%5.1f s] %2d. %s", time.Since(d.began).Seconds(), d.step, what)
	began := time.Now()
	evidence, err := run(ctx)
	if err != nil {
		if d.c != nil {
			d.say("%s", d.c.Tail())
		}
		return fmt.Errorf("the demo failed at step %d (%s): %w", d.step, what, err)
	}
	d.table = append(d.table, [3]string{what, fmt.Sprintf("%.1f s", time.Since(began).Seconds()), evidence})
	d.say("            %s", evidence)
	return nil
}

func (d *demo) say(format string, args ...any) { fmt.Fprintf(d.cfg.Out, format+"\n", args...) }

// cairn runs a command of the command line.
func (d *demo) cairn(ctx context.Context, args ...string) (string, error) {
	return d.c.Cairn(ctx, args...)
}

// inGuest runs a command in the guest; a failing one is an error.
func (d *demo) inGuest(ctx context.Context, command string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, guestWait)
	defer cancel()
	out, err := d.con.Must(ctx, command)
	return strings.TrimSpace(out), err
}

// close stops what still runs and removes every file.
func (d *demo) close() error {
	var errs []error
	if d.con != nil {
		errs = append(errs, d.con.Close())
	}
	if d.c != nil {
		ctx, cancel := context.WithTimeout(context.Background(), guestWait)
		defer cancel()
		if d.con != nil {
			_, err := d.cairn(ctx, "vm", "stop", vmName, "--force")
			errs = append(errs, err)
		}
		errs = append(errs, d.c.Close())
	}
	return errors.Join(append(errs, os.RemoveAll(d.dir))...)
}

// print shows what happened, and what each server physically holds.
func (d *demo) print(ctx context.Context) error {
	servers, err := d.servers(ctx)
	if err != nil {
		return err
	}
	d.say("")
	w := tabwriter.NewWriter(d.cfg.Out, 0, 8, 2, ' ', 0)
	for i, r := range d.table {
		fmt.Fprintf(w, "%d.\t%s\t%s\t%s\n", i+1, r[0], r[1], r[2])
	}
	if err := w.Flush(); err != nil {
		return err
	}
	d.say("")
	fmt.Fprintln(w, "SERVER\tLOGICAL\tLIVE\tON DISK\t")
	for _, s := range servers {
		fmt.Fprintf(w, "%s\t%d MiB\t%d MiB\t%d MiB\t\n", s.Host, s.Logical>>20, s.Live>>20, s.Physical>>20)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	d.say("\nwhole demo: %.1f s; nothing is left running", time.Since(d.began).Seconds())
	return nil
}

// storePath is a host's store file.
func (d *demo) storePath(host string) string { return filepath.Join(d.c.Dir(), host, "store-1") }

// pid is the process of a node, 0 while there is none.
func (d *demo) pid(name string) int {
	b, err := os.ReadFile(filepath.Join(d.c.Dir(), "run", name+".pid"))
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0
	}
	return pid
}
