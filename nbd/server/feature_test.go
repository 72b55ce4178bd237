package server_test

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/nbd"
	"github.com/cairnstore/cairn/nbd/client"
	"github.com/cairnstore/cairn/nbd/server"
	"github.com/cairnstore/cairn/proto/status"
)

func random(n int, seed uint64) []byte {
	var key [32]byte
	be.PutUint64(key[:], seed)
	b := make([]byte, n)
	if _, err := rand.NewChaCha8(key).Read(b); err != nil {
		panic(err) // it never fails
	}
	return b
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantKind(t testing.TB, err error, k status.Kind) {
	t.Helper()
	if !errors.Is(err, k) {
		t.Errorf("got %v, want %v", err, k)
	}
}

func TestReadsWhatWasWritten(t *testing.T) {
	m := newMemory(48 << 20)
	s := serve(t, server.Config{Exports: exports{"v": m}})
	for _, uri := range []string{s.uri("v"), s.tcpURI("v")} {
		c := dial(t, uri, nil)
		for i, n := range []int{1, 511, 4096, 4097, 100 << 10, 160<<10 + 1, 1 << 20, 33 << 20} {
			want, off := random(n, uint64(i)), int64(i*1000+1)
			_, err := c.WriteAt(want, off)
			must(t, err)
			got := make([]byte, n)
			_, err = c.ReadAt(got, off)
			must(t, err)
			if !bytes.Equal(got, want) || !bytes.Equal(m.at(int(off), n), want) {
				t.Fatalf("%s: %d bytes at %d differ", uri, n, off)
			}
		}
	}
}

func TestLargestPayload(t *testing.T) {
	s := serve(t, server.Config{Exports: exports{"v": newMemory(40 << 20)}})
	c := dial(t, s.uri("v"), nil)
	want := random(nbd.MaxPayload, 7)
	for _, cmd := range []uint16{nbd.CmdWrite, nbd.CmdRead} {
		buf := want
		if cmd == nbd.CmdRead {
			buf = make([]byte, nbd.MaxPayload)
		}
		must(t, do(c, &client.Req{Type: cmd, Off: 5, Data: buf}))
		if !bytes.Equal(buf, want) {
			t.Fatal("the largest read differs from the largest write")
		}
	}
}

// do sends one request and waits.
func do(c *client.Client, r *client.Req) error {
	done := make(chan struct{})
	r.Done = func(*client.Req) { close(done) }
	c.Start(r)
	<-done
	return r.Err
}

func TestCommandsReachTheVolume(t *testing.T) {
	m := newMemory(8 << 20)
	m.record = true
	s := serve(t, server.Config{Exports: exports{"v": m}})
	c := dial(t, s.uri("v"), nil)
	_, err := c.WriteFUA(make([]byte, 10), 3)
	must(t, err)
	must(t, c.Flush())
	must(t, c.Trim(4096, 8192))
	must(t, c.WriteZeroes(100, 3<<20, nbd.CmdFUA|nbd.CmdFastZero))
	must(t, c.Cache(0, 5<<20))
	must(t, c.WriteZeroes(100, 2<<20, nbd.CmdNoHole|nbd.CmdFUA))
	want := []volume.Op{
		{Kind: volume.OpWrite, FUA: true, Off: 3, Len: 10},
		{Kind: volume.OpFlush},
		{Kind: volume.OpTrim, Off: 4096, Len: 8192},
		{Kind: volume.OpZero, FUA: true, Off: 100, Len: 3 << 20},
		{Kind: volume.OpRead, Off: 0, Len: 1 << 20},
		{Kind: volume.OpWrite, FUA: true, Off: 100, Len: 1<<20 - 100},
		{Kind: volume.OpWrite, FUA: true, Off: 1 << 20, Len: 1 << 20},
		{Kind: volume.OpWrite, FUA: true, Off: 2 << 20, Len: 100},
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.ops) != len(want) {
		t.Fatalf("got %+v", m.ops)
	}
	for i := range want {
		if g := m.ops[i]; g.Kind != want[i].Kind || g.FUA != want[i].FUA || g.Off != want[i].Off || g.Len != want[i].Len {
			t.Errorf("operation %d is %+v, want %+v", i, g, want[i])
		}
	}
}

func TestErrorNumbers(t *testing.T) {
	m, ro := newMemory(1<<20), newMemory(1<<20)
	ro.readOnly = true
	s := serve(t, server.Config{Exports: exports{"v": m, "ro": ro}})
	const size = 1 << 20
	type try struct {
		export string
		req    client.Req
		want   status.Kind
	}
	tries := []try{
		{"v", client.Req{Type: nbd.CmdRead, Off: size - 1, Data: make([]byte, 2)}, status.Invalid},
		{"v", client.Req{Type: nbd.CmdRead, Off: 1<<64 - 1, Data: make([]byte, 2)}, status.Invalid},
		{"v", client.Req{Type: nbd.CmdWrite, Off: size - 1, Data: make([]byte, 2)}, status.NoSpace},
		{"v", client.Req{Type: nbd.CmdWrite, Off: 1<<64 - 1, Data: make([]byte, 300<<10)}, status.NoSpace},
		{"v", client.Req{Type: nbd.CmdWriteZeroes, Off: size, Len: 1}, status.NoSpace},
		{"v", client.Req{Type: nbd.CmdWriteZeroes, Off: 0, Len: 1<<32 - 1}, status.NoSpace},
		{"v", client.Req{Type: nbd.CmdTrim, Off: size, Len: 1}, status.Invalid},
		{"v", client.Req{Type: nbd.CmdCache, Off: size, Len: 1}, status.Invalid},
		{"v", client.Req{Type: nbd.CmdBlockStatus, Off: size, Len: 1}, status.Invalid},
		{"v", client.Req{Type: nbd.CmdBlockStatus, Off: 0, Len: 0}, status.Invalid},
		{"v", client.Req{Type: nbd.CmdRead, Flags: 1 << 15, Data: make([]byte, 2)}, status.Invalid},
		{"v", client.Req{Type: nbd.CmdRead, Flags: nbd.CmdNoHole, Data: make([]byte, 2)}, status.Invalid},
		{"v", client.Req{Type: nbd.CmdWrite, Flags: nbd.CmdReqOne, Data: make([]byte, 2)}, status.Invalid},
		{"v", client.Req{Type: nbd.CmdWriteZeroes, Flags: nbd.CmdNoHole | nbd.CmdFastZero, Len: 8}, status.Unsupported},
		{"v", client.Req{Type: 77, Len: 5}, status.Invalid},
		{"ro", client.Req{Type: nbd.CmdWrite, Data: make([]byte, 2)}, status.Permission},
		{"ro", client.Req{Type: nbd.CmdTrim, Len: 4096}, status.Permission},
		{"ro", client.Req{Type: nbd.CmdWriteZeroes, Len: 4096}, status.Permission},
		{"ro", client.Req{Type: nbd.CmdRead, Data: make([]byte, 2)}, status.OK},
		{"ro", client.Req{Type: nbd.CmdFlush}, status.OK},
	}
	conns := map[string]*client.Client{"v": dial(t, s.uri("v"), nil), "ro": dial(t, s.uri("ro"), nil)}
	for i := range tries {
		tr := &tries[i]
		if k := status.Of(do(conns[tr.export], &tr.req)); k != tr.want {
			t.Errorf("try %d on %s (type %d): %v, want %v", i, tr.export, tr.req.Type, k, tr.want)
		}
	}
	if !bytes.Equal(m.at(0, size), make([]byte, size)) {
		t.Fatal("a refused write has changed the volume")
	}
	for _, k := range []status.Kind{status.NoSpace, status.IO, status.Shutdown, status.Permission} {
		m.mu.Lock()
		m.refuse = k
		m.mu.Unlock()
		for _, cmd := range []uint16{nbd.CmdRead, nbd.CmdWrite} { // a client leaves after ESHUTDOWN
			wantKind(t, do(dial(t, s.uri("v"), nil), &client.Req{Type: cmd, Data: make([]byte, 8192)}), k)
		}
	}
}

func TestInformation(t *testing.T) {
	ro := newMemory(1 << 20)
	ro.readOnly = true
	s := serve(t, server.Config{Exports: exports{"v": newMemory(5 << 20), "ro": ro, "": newMemory(3 << 20)}})
	ctx := context.Background()
	x, err := client.Info(ctx, s.uri("v"), nil)
	must(t, err)
	want := nbd.Export{Name: "v", Size: 5 << 20, MinBlock: 1, PreferBlock: 4096, MaxBlock: 32 << 20,
		Flags: nbd.HasFlags | nbd.SendFlush | nbd.SendFUA | nbd.SendTrim | nbd.SendWriteZeroes | nbd.SendFastZero | nbd.CanMultiConn | nbd.SendCache}
	if x != want {
		t.Errorf("got %+v, want %+v", x, want)
	}
	x, err = client.Info(ctx, s.tcpURI("ro"), nil)
	must(t, err)
	if x.Flags&nbd.ReadOnly == 0 || x.Flags&(nbd.SendTrim|nbd.SendWriteZeroes) != 0 {
		t.Errorf("flags of a read-only export: %#x", x.Flags)
	}
	if c := dial(t, s.uri(""), nil); c.Size() != 3<<20 || c.Info().Flags&nbd.SendDF == 0 {
		t.Errorf("the default export: %+v", c.Info())
	}
	names, err := client.List(ctx, s.uri(""), nil)
	must(t, err)
	slices.Sort(names)
	if !slices.Equal(names, []string{"", "ro", "v"}) {
		t.Errorf("listed %q", names)
	}
	for name, k := range map[string]status.Kind{"nothing": status.NotFound, "forbidden": status.Permission, "leaving": status.Shutdown} {
		_, err := client.Dial(ctx, s.uri(name), nil)
		wantKind(t, err, k)
	}
}

func TestBlockStatus(t *testing.T) {
	m := newMemory(1<<20 + 100)
	s := serve(t, server.Config{Exports: exports{"v": m}})
	c := dial(t, s.uri("v"), nil)
	_, err := c.WriteAt([]byte{1}, 200<<10)
	must(t, err)
	xs, err := c.BlockStatus(10, 1<<20)
	must(t, err)
	hole := nbd.StateHole | nbd.StateZero
	want := []nbd.Extent{{Len: 192<<10 - 10, State: hole}, {Len: 64 << 10}, {Len: 1<<20 + 10 - 256<<10, State: hole}}
	if !slices.Equal(xs, want) {
		t.Errorf("got %v, want %v", xs, want)
	}
	one := client.Req{Type: nbd.CmdBlockStatus, Flags: nbd.CmdReqOne, Off: 10, Len: 1 << 20}
	must(t, do(c, &one))
	if !slices.Equal(one.Extents, want[:1]) {
		t.Errorf("with REQ_ONE got %v", one.Extents)
	}
}

func TestAnswersOutOfOrder(t *testing.T) {
	m := newMemory(1 << 20)
	s := serve(t, server.Config{Exports: exports{"v": m}})
	c := dial(t, s.uri("v"), nil)
	copy(m.data, random(len(m.data), 3))
	m.hold()
	var mu sync.Mutex
	var order []uint64
	var wg sync.WaitGroup
	const n = 40
	reqs := make([]client.Req, n)
	for i := range reqs {
		wg.Add(1)
		reqs[i] = client.Req{Type: nbd.CmdRead, Off: uint64(i) * 4096, Data: make([]byte, 4096), Done: func(r *client.Req) {
			mu.Lock()
			order = append(order, r.Off/4096)
			mu.Unlock()
			wg.Done()
		}}
		c.Start(&reqs[i])
	}
	waitFor(t, "all reads to reach the volume", func() bool { return m.kept() == n })
	m.letGo()
	wg.Wait()
	for i := range reqs {
		must(t, reqs[i].Err)
		if !bytes.Equal(reqs[i].Data, m.at(i*4096, 4096)) {
			t.Fatalf("read %d got another one's data", i)
		}
		if order[i] != uint64(n-1-i) {
			t.Fatalf("answers came in order %v", order)
		}
	}
}

func TestResizeIsSeenByOpenConnections(t *testing.T) {
	m := newMemory(1 << 20)
	s := serve(t, server.Config{Exports: exports{"v": m}})
	c := dial(t, s.uri("v"), nil)
	wantKind(t, do(c, &client.Req{Type: nbd.CmdWrite, Off: 1 << 20, Data: []byte{1}}), status.NoSpace)
	m.mu.Lock()
	m.data, m.present = append(m.data, make([]byte, 1<<20)...), make([]bool, 2<<20/memoryThin)
	m.mu.Unlock()
	must(t, do(c, &client.Req{Type: nbd.CmdWrite, Off: 1 << 20, Data: []byte{1}}))
	x, err := client.Info(context.Background(), s.uri("v"), nil)
	must(t, err)
	if x.Size != 2<<20 {
		t.Errorf("a new connection sees %d bytes", x.Size)
	}
}
