package server_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/cairnstore/cairn/nbd/client"
	"github.com/cairnstore/cairn/nbd/server"
)

// childEnv makes this test's binary the child of TestInheritedSocket.
const childEnv = "CAIRN_NBD_TEST_CHILD"

// TestMain is a server over an inherited socket when it is asked to be.
func TestMain(m *testing.M) {
	if os.Getenv(childEnv) == "" {
		os.Exit(m.Run())
	}
	l, err := server.Inherited("nbd")
	if err != nil || l == nil {
		fmt.Fprintln(os.Stderr, "no socket:", err)
		os.Exit(1)
	}
	if again, err := server.Inherited("nbd"); again != nil || err != nil {
		fmt.Fprintln(os.Stderr, "a second one:", again, err)
		os.Exit(1)
	}
	s := server.New(server.Config{Exports: exports{"v": newMemory(1 << 20)}})
	fmt.Fprintln(os.Stderr, s.Serve(l)) // until it is killed
	os.Exit(1)
}

// TestInheritedSocket: who connects while the server's process is dead is
// served by the next one, without having been refused.
func TestInheritedSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := server.ListenUnix(server.Socket{Path: path})
	must(t, err)
	start := func() *exec.Cmd {
		f, env, err := server.Bequeath(l, "nbd")
		must(t, err)
		cmd := exec.Command(os.Args[0])
		cmd.Env, cmd.ExtraFiles, cmd.Stderr = append(append(os.Environ(), env...), childEnv+"=1"), []*os.File{f}, os.Stderr
		must(t, cmd.Start())
		must(t, f.Close())
		return cmd
	}
	uri := "nbd+unix:///v?socket=" + path
	for range 3 {
		type dialed struct {
			c   *client.Client
			err error
		}
		came := make(chan dialed, 1)
		go func() { // there is no server yet
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			defer cancel()
			c, err := client.Dial(ctx, uri, nil)
			came <- dialed{c, err}
		}()
		cmd := start()
		d := <-came
		must(t, d.err)
		if d.c.Size() != 1<<20 {
			t.Errorf("size %d", d.c.Size())
		}
		must(t, cmd.Process.Kill())
		if err := cmd.Wait(); err == nil {
			t.Error("the child ended by itself")
		}
		<-d.c.Done()
		must(t, d.c.Close())
	}
	must(t, l.Close())
	if _, err := net.Dial("unix", path); err == nil {
		t.Error("the socket outlives its owner")
	}
	if l, err := server.Inherited("nbd"); l != nil || err != nil {
		t.Errorf("a process that was given none: %v, %v", l, err)
	}
}
