package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/vmhook/machine"
)

func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 80*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// TestEnsureAtOnce has several callers; one builds, all get the same image,
// and a tool that changed gives another.
func TestEnsureAtOnce(t *testing.T) {
	ctx := testContext(t)
	first, err := Ensure(ctx, Config{Progress: func(s string) { t.Log(s) }})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(first.Initrd); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	built := 0
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			img, err := Ensure(ctx, Config{Progress: func(string) { mu.Lock(); built++; mu.Unlock() }})
			if err != nil || img != first {
				t.Errorf("%+v, %v; want %+v", img, err, first)
			}
		})
	}
	wg.Wait()
	if built != 1 {
		t.Errorf("built %d times", built)
	}
	st, err := os.Stat(first.Initrd)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("initrd: %d KiB", st.Size()>>10)
	if st.Size() > 5<<20 {
		t.Errorf("the initrd has %d bytes; it is to be small", st.Size())
	}
}

// boot starts a guest without a disk.
func boot(t *testing.T, ctx context.Context) *machine.Machine {
	t.Helper()
	img, err := Ensure(ctx, Config{})
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "guest")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	m, err := machine.Start(ctx, machine.Spec{
		Name: "g", CPUs: 1, MemoryBytes: MemoryBytes, Dir: dir,
		Kernel: img.Kernel, Initrd: img.Initrd, Append: img.Append,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Stop(context.Background(), true); err != nil {
			t.Error(err)
		}
		m.Release()
	})
	return m
}

func dial(t *testing.T, ctx context.Context, socket string) *Console {
	t.Helper()
	c, err := Dial(ctx, socket)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func closeConsole(t *testing.T, c *Console) {
	t.Helper()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func TestConsole(t *testing.T) {
	ctx := testContext(t)
	m := boot(t, ctx)
	socket := m.Status().Console
	c := dial(t, ctx, socket)
	everyByte(t, ctx, c)
	commands(t, ctx, c)
	givenUp(t, ctx, c)
	tooMuch(t, ctx, c)
	// Whatever state the console was left in, the next one gets a shell.
	closeConsole(t, c)
	c = dial(t, ctx, socket)
	if err := c.conn.Close(); err != nil { // as a crash would leave it
		t.Fatal(err)
	}
	c.wg.Wait()
	person(t, ctx, socket)
	c = dial(t, ctx, socket)
	if got, err := c.Must(ctx, "echo $((6 * 7))"); err != nil || got != "42" {
		t.Errorf("after everything: %q, %v", got, err)
	}
	// The guest powers off under a command.
	if _, err := c.Run(ctx, "poweroff -f; sleep 60"); !errors.Is(err, status.Unavailable) {
		t.Errorf("console of a guest that went away: %v", err)
	}
	closeConsole(t, c)
	select {
	case <-m.Done():
	case <-ctx.Done():
		t.Fatal("the guest did not end")
	}
	if why := m.Exit(); why != "the guest powered off" {
		t.Errorf("exit: %q", why)
	}
}

// everyByte sends all byte values there and back.
func everyByte(t *testing.T, ctx context.Context, c *Console) {
	t.Helper()
	var want bytes.Buffer
	var script strings.Builder
	for b := range 256 {
		want.WriteByte(byte(b))
		fmt.Fprintf(&script, "\\%03o", b)
	}
	out, err := c.Run(ctx, "printf '"+script.String()+"'")
	if err != nil || out.Text != want.String() || out.Status != 0 {
		t.Errorf("every byte: %q, status %d, %v", out.Text, out.Status, err)
	}
}

func commands(t *testing.T, ctx context.Context, c *Console) {
	t.Helper()
	for _, x := range []struct {
		command, text string
		status        int
	}{
		{"", "", 0},
		{"echo", "\n", 0},
		{"printf no-newline", "no-newline", 0},
		{"echo a; echo b >&2; exit 7", "a\nb\n", 7},
		{"cat", "", 0}, // stdin is empty, and not the next command
		{"exit", "", 0},
		{"kill -9 $$", "Killed\n", 137},
		{"echo '" + strings.Repeat("long ", 10000) + "' | wc -c", "50001\n", 0},
		{"echo \"quo\\\"tes\" 'and $dollars'\necho two lines", "quo\"tes and $dollars\ntwo lines\n", 0},
		{"printf '#x# end 0\\n\\n'; printf '\\n" + c.mark[:5] + " end 3\\n'", "#x# end 0\n\n\n" + c.mark[:5] + " end 3\n", 0},
	} {
		out, err := c.Run(ctx, x.command)
		if err != nil || out.Text != x.text || out.Status != x.status {
			t.Errorf("%.60q: %q, status %d, %v; want %q, status %d", x.command, out.Text, out.Status, err, x.text, x.status)
		}
	}
	if out, err := c.Run(ctx, "( unbalanced"); err != nil || out.Status != 2 || !strings.Contains(out.Text, "syntax error") {
		t.Errorf("a syntax error: %+v, %v", out, err)
	}
	if _, err := c.Must(ctx, "echo because; false"); !errors.Is(err, status.IO) || !strings.Contains(err.Error(), "because") {
		t.Errorf("Must: %v", err)
	}
	if _, err := c.Run(ctx, strings.Repeat("x", CommandMaxBytes+1)); !errors.Is(err, status.TooBig) {
		t.Errorf("a huge command: %v", err)
	}
	if got, err := c.Must(ctx, "cat /lib/modules/order; lsmod | wc -l; ls /sys/bus/virtio/drivers"); err != nil || !strings.Contains(got, "virtio_blk") {
		t.Errorf("modules: %q, %v", got, err)
	}
	if got, err := c.Must(ctx, "mkfs.ext4 -V 2>&1; resize2fs 2>&1; e2fsck -V 2>&1; fstrim --version; true"); err != nil || strings.Contains(got, "not found") || strings.Contains(got, "error while loading") {
		t.Errorf("tools: %q, %v", got, err)
	}
}

// givenUp ends the wait for a command; the next one interrupts it.
func givenUp(t *testing.T, ctx context.Context, c *Console) {
	t.Helper()
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	if _, err := c.Run(short, "echo begun; sleep 1000"); !errors.Is(err, status.Timeout) {
		t.Errorf("given up: %v", err)
	}
	if got, err := c.Must(ctx, "ps | grep -c '[s]leep 1000' || true"); err != nil || got != "0" {
		t.Errorf("after giving up: %q commands left, %v", got, err)
	}
}

// tooMuch says more than is kept; the console works on.
func tooMuch(t *testing.T, ctx context.Context, c *Console) {
	t.Helper()
	if _, err := c.Run(ctx, "dd if=/dev/zero bs=1k count=300 2>/dev/null"); !errors.Is(err, status.TooBig) {
		t.Errorf("too much output: %v", err)
	}
	if got, err := c.Must(ctx, "echo fine"); err != nil || got != "fine" {
		t.Errorf("after too much output: %q, %v", got, err)
	}
}

// person uses the console as a person at a terminal would: there is a prompt,
// and what is typed is echoed.
func person(t *testing.T, ctx context.Context, socket string) {
	t.Helper()
	c, err := Open(ctx, socket)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Send(ctx, []byte("\x03\n")); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Expect(ctx, regexp.MustCompile(`cairn# `)); err != nil {
		t.Fatal(err)
	}
	if err := c.Send(ctx, []byte("echo per''son\n")); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Expect(ctx, regexp.MustCompile(`echo per''son\r\nperson\r\n`)); err != nil {
		t.Error(err)
	}
	closeConsole(t, c)
}

func TestNoConsole(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if _, err := Dial(ctx, filepath.Join(t.TempDir(), "none")); !errors.Is(err, status.Timeout) {
		t.Errorf("no socket: %v", err)
	}
}
