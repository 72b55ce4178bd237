package server_test

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/nbd/client"
	"github.com/cairnstore/cairn/nbd/server"
	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/status"
)

// memory is a volume in memory, thin by 64 KiB. It answers inline; held makes
// it keep operations back until let go.
type memory struct {
	mu       sync.Mutex // guards all
	data     []byte
	present  []bool // per 64 KiB
	readOnly bool
	held     bool
	keptBack []*volume.Op
	refuse   status.Kind // answer of every operation
	flushes  int
	written  uint64
	fua      int
	ops      []volume.Op // what came, Data left out
	record   bool
	blocked  chan struct{} // Submit waits for it to close; nil: does not
}

const memoryThin = 64 << 10

func newMemory(size int) *memory {
	return &memory{data: make([]byte, size), present: make([]bool, (size+memoryThin-1)/memoryThin)}
}

func (m *memory) Size() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return uint64(len(m.data))
}

func (m *memory) ReadOnly() bool { return m.readOnly }

func (m *memory) Submit(ops []*volume.Op) {
	m.mu.Lock()
	if b := m.blocked; b != nil {
		m.mu.Unlock()
		<-b
		m.mu.Lock()
	}
	if m.held {
		m.keptBack = append(m.keptBack, ops...)
		m.mu.Unlock()
		return
	}
	list := doneLists.Get().(*[]volume.Done)
	done := m.apply(ops, (*list)[:0])
	m.mu.Unlock()
	complete(done)
	clear(done)
	*list = done
	doneLists.Put(list)
}

// doneLists are the lists Submit gives operations back in.
var doneLists = sync.Pool{New: func() any { s := make([]volume.Done, 0, 64); return &s }}

func (m *memory) apply(ops []*volume.Op, done []volume.Done) []volume.Done {
	for _, op := range ops {
		done = append(done, volume.Done{Op: op, Status: m.do(op)})
	}
	return done
}

// complete gives operations back as a gateway does: runs of one connection.
func complete(done []volume.Done) {
	for len(done) > 0 {
		n := 1
		for n < len(done) && done[n].Op.User == done[0].Op.User {
			n++
		}
		done[0].Op.User.(volume.Completer).Complete(done[:n])
		done = done[n:]
	}
}

func (m *memory) do(op *volume.Op) status.Kind {
	if m.record {
		m.ops = append(m.ops, volume.Op{Kind: op.Kind, FUA: op.FUA, Off: op.Off, Len: op.Len})
	}
	if m.refuse != status.OK {
		return m.refuse
	}
	if op.FUA {
		m.fua++
	}
	if op.Kind == volume.OpFlush {
		m.flushes++
		return status.OK
	}
	b := m.data[op.Off : op.Off+op.Len]
	switch op.Kind {
	case volume.OpRead:
		for i := range op.States {
			op.States[i] = volume.BlockData
			if !m.present[(op.Off+uint64(i)*ids.BlockSize)/memoryThin] {
				op.States[i] = volume.BlockHole
			}
		}
		if op.States == nil {
			copy(op.Data, b)
		}
	case volume.OpWrite:
		copy(b, op.Data)
		m.written += op.Len
		for i := op.Off / memoryThin; i <= (op.Off+op.Len-1)/memoryThin; i++ {
			m.present[i] = true
		}
	default:
		clear(b)
		for i := (op.Off + memoryThin - 1) / memoryThin; i < (op.Off+op.Len)/memoryThin; i++ {
			m.present[i] = false
		}
	}
	return status.OK
}

func (m *memory) Extents(off, n uint64) []volume.Extent {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []volume.Extent
	for n > 0 {
		step, hole := min(n, memoryThin-off%memoryThin), !m.present[off/memoryThin]
		if k := len(out); k > 0 && out[k-1].Hole == hole {
			out[k-1].Len += step
		} else {
			out = append(out, volume.Extent{Len: step, Hole: hole})
		}
		off, n = off+step, n-step
	}
	return out
}

// at is a copy of n bytes of the content.
func (m *memory) at(off, n int) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]byte(nil), m.data[off:off+n]...)
}

// write changes the content behind the server's back.
func (m *memory) write(p []byte, off int) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	op := volume.Op{Kind: volume.OpWrite, Off: uint64(off), Len: uint64(len(p)), Data: p}
	if k := m.do(&op); k != status.OK {
		return 0, k
	}
	return len(p), nil
}

// counts says how many FUA operations and flushes have come.
func (m *memory) counts() (fua, flushes int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.fua, m.flushes
}

// bytesWritten is how much was ever written.
func (m *memory) bytesWritten() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.written
}

// hold makes the volume keep operations back.
func (m *memory) hold() {
	m.mu.Lock()
	m.held = true
	m.mu.Unlock()
}

// kept is how many operations are kept back.
func (m *memory) kept() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.keptBack)
}

// letGo answers what was kept back, last first, from the caller's goroutine.
func (m *memory) letGo() {
	m.mu.Lock()
	ops := m.keptBack
	m.held, m.keptBack = false, nil
	for i, j := 0, len(ops)-1; i < j; i, j = i+1, j-1 {
		ops[i], ops[j] = ops[j], ops[i]
	}
	done := m.apply(ops, nil)
	m.mu.Unlock()
	complete(done)
}

// exports is a fixed set of volumes.
type exports map[string]server.Volume

func (x exports) List() []string {
	var out []string
	for n := range x {
		out = append(out, n)
	}
	return out
}

func (x exports) Open(name string) (server.Volume, error) {
	if name == "forbidden" {
		return nil, status.Errorf(status.Permission, "export %q is not for you", name)
	}
	if name == "leaving" {
		return nil, status.Errorf(status.Shutdown, "export %q is going away", name)
	}
	v, ok := x[name]
	if !ok {
		return nil, status.Errorf(status.NotFound, "there is no export %q", name)
	}
	return v, nil
}

// running is a server under test on a unix socket and a TCP port.
type running struct {
	*server.Server
	sock string
	tcp  string
}

func (r *running) uri(name string) string    { return "nbd+unix:///" + name + "?socket=" + r.sock }
func (r *running) tcpURI(name string) string { return "nbd://" + r.tcp + "/" + name }

// serve starts a server and ends it with the test.
func serve(t testing.TB, cfg server.Config) *running {
	t.Helper()
	r := &running{Server: server.New(cfg), sock: filepath.Join(t.TempDir(), "s")}
	ul, err := server.ListenUnix(server.Socket{Path: r.sock})
	if err != nil {
		t.Fatal(err)
	}
	tl, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r.tcp = tl.Addr().String()
	ends := make(chan error, 2)
	go func() { ends <- r.Serve(ul) }()
	go func() { ends <- r.Serve(tl) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := r.Close(ctx); err != nil {
			t.Errorf("close the server: %v", err)
		}
		for range 2 {
			if err := <-ends; !errors.Is(err, server.ErrClosed) {
				t.Errorf("Serve ended with %v", err)
			}
		}
	})
	return r
}

// dial connects and disconnects with the test.
func dial(t testing.TB, uri string, conf *tls.Config) *client.Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c, err := client.Dial(ctx, uri, conf)
	if err != nil {
		t.Fatalf("dial %s: %v", uri, err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("close %s: %v", uri, err)
		}
	})
	return c
}

// counting is a volume of zeros that counts what is written to it.
type counting struct {
	size           uint64
	bytes, batches atomic.Uint64
}

func (v *counting) Size() uint64                        { return v.size }
func (v *counting) ReadOnly() bool                      { return false }
func (v *counting) Extents(_, n uint64) []volume.Extent { return []volume.Extent{{Len: n}} }
func (v *counting) Submit(ops []*volume.Op) {
	v.batches.Add(1)
	done := make([]volume.Done, 0, len(ops))
	for _, op := range ops {
		if op.Kind != volume.OpWrite || uint64(len(op.Data)) != op.Len {
			done = append(done, volume.Done{Op: op, Status: status.Internal})
			continue
		}
		v.bytes.Add(op.Len)
		done = append(done, volume.Done{Op: op})
	}
	complete(done)
}
