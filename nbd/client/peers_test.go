package client_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/pojntfx/go-nbd/pkg/backend"
	gonbd "github.com/pojntfx/go-nbd/pkg/server"

	"github.com/cairnstore/cairn/nbd"
	"github.com/cairnstore/cairn/nbd/client"
	"github.com/cairnstore/cairn/proto/status"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func dial(t testing.TB, uri string) *client.Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := client.Dial(ctx, uri, nil)
	if err != nil {
		t.Fatalf("dial %s: %v", uri, err)
	}
	t.Cleanup(func() { must(t, c.Close()) })
	return c
}

// program runs a server of somebody else's until the test ends, and waits
// until its socket is there.
func program(t *testing.T, sock string, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	must(t, cmd.Start())
	t.Cleanup(func() {
		if err := cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Error(err)
		}
		if err := cmd.Wait(); err != nil && cmd.ProcessState == nil {
			t.Error(err)
		}
	})
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		c, err := net.Dial("unix", sock)
		if err == nil {
			must(t, c.Close())
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s does not serve: %s", name, out.String())
		}
	}
}

// exercise writes and reads what every server can.
func exercise(t *testing.T, c *client.Client) {
	t.Helper()
	r := rand.New(rand.NewPCG(3, 4))
	want := make([]byte, 5<<20)
	for i := range want {
		want[i] = byte(r.Uint32())
	}
	for _, off := range []int64{0, 512, 3 << 20} {
		n, err := c.WriteAt(want, off)
		if err != nil || n != len(want) {
			t.Fatalf("write at %d: %d bytes, %v", off, n, err)
		}
		got := make([]byte, len(want))
		if n, err := c.ReadAt(got, off); err != nil || n != len(want) || !bytes.Equal(got, want) {
			t.Fatalf("read at %d: %d bytes, %v", off, n, err)
		}
	}
}

func TestGoNBDServer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	end := make(chan error, 2)
	go func() {
		for range 2 {
			nc, err := l.Accept()
			if err != nil {
				end <- err
				return
			}
			go func() {
				err := gonbd.Handle(nc, []*gonbd.Export{{Name: "v", Backend: backend.NewMemoryBackend(make([]byte, 16<<20))}}, nil)
				end <- errors.Join(err, nc.Close())
			}()
		}
	}()
	names, err := client.List(context.Background(), "nbd://"+l.Addr().String()+"/", nil)
	must(t, err)
	if !slices.Equal(names, []string{"v"}) {
		t.Errorf("listed %q", names)
	}
	must(t, <-end)
	c, err := client.Dial(context.Background(), "nbd://"+l.Addr().String()+"/v", nil)
	must(t, err)
	if c.Structured() || c.HasBlockStatus() || c.Size() != 16<<20 || c.MaxBytes() != 32<<20 {
		t.Errorf("negotiated %+v", c.Info())
	}
	exercise(t, c)
	if _, err := c.BlockStatus(0, 4096); !errors.Is(err, status.Unsupported) {
		t.Errorf("block status of a server without: %v", err)
	}
	must(t, c.Close())
	must(t, <-end)
	must(t, l.Close())
}

func TestQEMUNBDServer(t *testing.T) {
	dir := t.TempDir()
	sock, img := filepath.Join(dir, "s"), filepath.Join(dir, "img")
	f, err := os.Create(img)
	must(t, err)
	must(t, f.Truncate(16<<20))
	must(t, f.Close())
	program(t, sock, "qemu-nbd", "-t", "-e", "8", "-f", "raw", "-x", "v", "-k", sock, "--discard=unmap", img)
	c := dial(t, "nbd+unix:///v?socket="+sock)
	if !c.Structured() || !c.HasBlockStatus() {
		t.Errorf("negotiated %+v", c.Info())
	}
	b := make([]byte, 1<<20)
	b[0] = 1
	if _, err := c.ReadAt(b, 4<<20); err != nil || b[0] != 0 { // a hole chunk
		t.Errorf("read of a hole: %v, %d", err, b[0])
	}
	exercise(t, c)
	_, err = c.WriteFUA([]byte("durable"), 9<<20)
	must(t, err)
	must(t, c.Flush())
	must(t, c.Trim(4<<20, 1<<20))
	must(t, c.WriteZeroes(6<<20, 1<<20, nbd.CmdNoHole))
	must(t, c.Cache(0, 1<<20))
	if _, err := c.ReadAt(b, 6<<20); err != nil || !bytes.Equal(b, make([]byte, len(b))) {
		t.Errorf("read of zeros: %v", err)
	}
	xs, err := c.BlockStatus(0, 16<<20)
	must(t, err)
	sum, hole := uint64(0), false
	for _, x := range xs {
		sum += uint64(x.Len)
		hole = hole || x.State&nbd.StateHole != 0
	}
	if sum != 16<<20 || !hole {
		t.Errorf("extents %v", xs)
	}
	if _, err := c.ReadAt(make([]byte, 2), 16<<20-1); err == nil || err.Error() != "EOF" {
		t.Errorf("a read over the end: %v", err)
	}
	r := client.Req{Type: nbd.CmdRead, Off: 16 << 20, Data: make([]byte, 1), Done: func(*client.Req) {}}
	done := make(chan struct{})
	r.Done = func(*client.Req) { close(done) }
	c.Start(&r)
	<-done
	if !errors.Is(r.Err, status.Invalid) {
		t.Errorf("a read beyond the end: %v", r.Err)
	}
	if _, err := client.Dial(context.Background(), "nbd+unix:///w?socket="+sock, nil); !errors.Is(err, status.NotFound) {
		t.Errorf("an unknown export: %v", err)
	}
	x, err := client.Info(context.Background(), "nbd+unix:///v?socket="+sock, nil)
	if err != nil || x.Size != 16<<20 || x.MaxBlock == 0 {
		t.Errorf("info: %+v %v", x, err)
	}
}

func TestNBDKitServer(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "s")
	program(t, sock, "nbdkit", "-f", "-U", sock, "memory", "16M")
	c := dial(t, "nbd+unix:///?socket="+sock)
	exercise(t, c)
	must(t, c.Trim(0, 16<<20))
	xs, err := c.BlockStatus(0, 16<<20)
	must(t, err)
	if len(xs) != 1 || xs[0].State != nbd.StateHole|nbd.StateZero || xs[0].Len != 16<<20 {
		t.Errorf("extents after a trim: %v", xs)
	}
	old := filepath.Join(t.TempDir(), "s")
	program(t, old, "nbdkit", "-f", "--mask-handshake=0", "-U", old, "memory", "16M")
	o := dial(t, "nbd+unix:///?socket="+old) // not even fixed newstyle: EXPORT_NAME and zeroes
	if o.Structured() || o.Size() != 16<<20 {
		t.Errorf("negotiated %+v", o.Info())
	}
	exercise(t, o)
}
