package machine

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chaos/guest"
)

// export is a real NBD server over a sparse file, which can be killed, hung,
// made to answer errors, and grown.
type export struct {
	t     *testing.T
	file  string
	sock  string
	ready string // its pid file
	errs  string // while this file exists, every request fails with EIO
	cmd   *exec.Cmd
}

// newExport serves a new sparse file.
func newExport(t *testing.T, dir string, sizeBytes int64) *export {
	t.Helper()
	e := &export{t: t, file: filepath.Join(dir, "disk"), sock: filepath.Join(dir, "nbd.sock"), errs: filepath.Join(dir, "fail"), ready: filepath.Join(dir, "nbdkit.pid")}
	if err := os.WriteFile(e.file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	e.grow(sizeBytes)
	e.start()
	t.Cleanup(e.kill)
	return e
}

func (e *export) uri() string { return "nbd+unix:///v?socket=" + e.sock }

// grow changes the size that connections made from now on are told.
func (e *export) grow(sizeBytes int64) {
	e.t.Helper()
	if err := os.Truncate(e.file, sizeBytes); err != nil {
		e.t.Fatal(err)
	}
}

// start starts the server and returns when it accepts.
func (e *export) start() {
	e.t.Helper()
	e.cmd = exec.Command("nbdkit", "--foreground", "--exit-with-parent", "--unix", e.sock, "--pidfile", e.ready,
		"--filter=error", "file", e.file, "error=EIO", "error-rate=100%", "error-file="+e.errs)
	e.cmd.Stderr = os.Stderr
	if err := e.cmd.Start(); err != nil {
		e.t.Fatalf("nbdkit: %v (apt-get install nbdkit)", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	await(e.t, ctx, "nbdkit accepts", func() bool { return ready(e.ready) })
}

// ready reports whether nbdkit has written its pid file, which it does once it
// accepts connections. (To try a connection, and to hang up, can make it exit.)
func ready(pidfile string) bool {
	text, err := os.ReadFile(pidfile)
	return err == nil && strings.HasSuffix(string(text), "\n")
}

// kill ends the server as a crash would.
func (e *export) kill() {
	if e.cmd == nil {
		return
	}
	e.signal(syscall.SIGKILL)
	var exit *exec.ExitError
	if err := e.cmd.Wait(); err != nil && !errors.As(err, &exit) {
		e.t.Errorf("nbdkit: %v", err)
	}
	e.cmd = nil
	for _, file := range []string{e.sock, e.ready} {
		if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
			e.t.Error(err)
		}
	}
}

func (e *export) signal(s syscall.Signal) {
	e.t.Helper()
	if err := e.cmd.Process.Signal(s); err != nil {
		e.t.Error(err)
	}
}

// await polls for a state of another process until ctx ends.
func await(t *testing.T, ctx context.Context, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("never: %s", what)
		}
	}
}

// rig is a guest booted on an export.
type rig struct {
	t   *testing.T
	ctx context.Context
	dir string
	nbd *export
	m   *Machine
	con *guest.Console
}

// image is the guest, made once.
func image(t *testing.T, ctx context.Context) guest.Image {
	t.Helper()
	img, err := guest.Ensure(ctx, guest.Config{Progress: func(s string) { t.Log(s) }})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// shortDir is a directory whose sockets have short paths.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "vm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func specFor(t *testing.T, ctx context.Context, dir string, nbd *export) Spec {
	t.Helper()
	img := image(t, ctx)
	return Spec{
		Name: "vm-1", CPUs: 1, MemoryBytes: guest.MemoryBytes, Dir: filepath.Join(dir, "vm"),
		Kernel: img.Kernel, Initrd: img.Initrd, Append: img.Append,
		Disks: []Disk{{Name: "v", URI: nbd.uri(), Serial: "cairn-v"}},
	}
}

// boot starts a guest and logs in; everything is gone at the test's end.
func boot(t *testing.T, sizeBytes int64) *rig {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Second)
	t.Cleanup(cancel)
	dir := shortDir(t)
	r := &rig{t: t, ctx: ctx, dir: dir, nbd: newExport(t, dir, sizeBytes)}
	r.start(specFor(t, ctx, dir, r.nbd))
	return r
}

func (r *rig) start(spec Spec) {
	r.t.Helper()
	m, err := Start(r.ctx, spec)
	if err != nil {
		r.t.Fatal(err)
	}
	r.m = m
	r.t.Cleanup(func() {
		if err := r.m.Stop(context.Background(), true); err != nil {
			r.t.Error(err)
		}
		r.m.Release()
	})
	r.login()
}

func (r *rig) login() {
	r.t.Helper()
	con, err := guest.Dial(r.ctx, r.m.Status().Console)
	if err != nil {
		r.t.Fatal(err)
	}
	r.con = con
	r.t.Cleanup(func() {
		if err := con.Close(); err != nil {
			r.t.Error(err)
		}
	})
}

// sh runs a command in the guest that has to succeed.
func (r *rig) sh(command string) string {
	r.t.Helper()
	out, err := r.con.Must(r.ctx, command)
	if err != nil {
		r.t.Fatal(err)
	}
	return out
}

// state waits for a state of the machine.
func (r *rig) state(want string) {
	r.t.Helper()
	await(r.t, r.ctx, "state "+want, func() bool { return r.m.Status().State == want })
}

// guestErrors are lines of the guest's kernel log that speak of its disk in
// trouble: none may appear.
func (r *rig) guestErrors() {
	r.t.Helper()
	out := r.sh("dmesg | grep -iE 'i/o error|blk_update|ext4-fs (error|warning)|aborted|hung task|remount' || true")
	if strings.TrimSpace(out) != "" {
		r.t.Errorf("the guest saw: %s", out)
	}
}
