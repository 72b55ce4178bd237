package bench

import (
	"sync"

	"github.com/cairnstore/cairn/chunk/volume"
	nbdserver "github.com/cairnstore/cairn/nbd/server"
	"github.com/cairnstore/cairn/proto/status"
)

// RAM is a volume in memory that answers inline: what an NBD server costs by
// itself. It is an export and the only one of its server.
type RAM struct {
	mu   sync.RWMutex // guards the content
	data []byte
}

var (
	_ nbdserver.Volume  = (*RAM)(nil)
	_ nbdserver.Exports = (*RAM)(nil)
)

// NewRAM returns a volume of zeros.
func NewRAM(sizeBytes uint64) *RAM { return &RAM{data: make([]byte, sizeBytes)} }

// List implements nbdserver.Exports.
func (r *RAM) List() []string { return []string{"v"} }

// Open implements nbdserver.Exports.
func (r *RAM) Open(name string) (nbdserver.Volume, error) {
	if name != "v" {
		return nil, status.Errorf(status.NotFound, "there is no export %q", name)
	}
	return r, nil
}

// Size implements nbdserver.Volume.
func (r *RAM) Size() uint64 { return uint64(len(r.data)) }

// ReadOnly implements nbdserver.Volume.
func (r *RAM) ReadOnly() bool { return false }

// Extents implements nbdserver.Volume.
func (r *RAM) Extents(_, n uint64) []volume.Extent { return []volume.Extent{{Len: n}} }

// doneLists are the lists Submit gives operations back in.
var doneLists = sync.Pool{New: func() any { s := make([]volume.Done, 0, 64); return &s }}

// Submit implements nbdserver.Volume: all operations are done when it returns.
func (r *RAM) Submit(ops []*volume.Op) {
	list := doneLists.Get().(*[]volume.Done)
	done := (*list)[:0]
	for _, op := range ops {
		r.do(op)
		done = append(done, volume.Done{Op: op})
	}
	for rest := done; len(rest) > 0; {
		n := 1
		for n < len(rest) && rest[n].Op.User == rest[0].Op.User {
			n++
		}
		user := rest[0].Op.User.(volume.Completer)
		user.Complete(rest[:n])
		rest = rest[n:]
	}
	clear(done)
	*list = done
	doneLists.Put(list)
}

func (r *RAM) do(op *volume.Op) {
	switch op.Kind {
	case volume.OpRead:
		clear(op.States) // all is data
		if op.States != nil {
			return
		}
		r.mu.RLock()
		copy(op.Data, r.data[op.Off:op.Off+op.Len])
		r.mu.RUnlock()
	case volume.OpWrite:
		r.mu.Lock()
		copy(r.data[op.Off:op.Off+op.Len], op.Data)
		r.mu.Unlock()
	case volume.OpZero, volume.OpTrim:
		r.mu.Lock()
		clear(r.data[op.Off : op.Off+op.Len])
		r.mu.Unlock()
	}
}
