package gateway

import (
	"context"
	"sync/atomic"
	"time"

	nbdserver "github.com/cairnstore/cairn/nbd/server"

	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/proto/status"
)

// An arrival is the export of a volume that another host's gateway is about to
// hand over: it can be opened here already, by a machine that waits for its
// memory. Reads go through the holder, which is the only one that knows what was
// written; writes are refused. Once the volume is attached here, what comes over
// the same connection goes to it.

// arrivalWait bounds a read that comes while the volume is on its way: its old
// holder refuses it, and the new one is not here yet.
const arrivalWait = 20 * time.Second

// ReadThrough reads from a volume through its holder.
type ReadThrough func(ctx context.Context, off uint64, p []byte) error

type arrival struct {
	g    *Gateway
	name string
	size uint64
	read ReadThrough
	here atomic.Pointer[Volume] // set once it is attached here
}

// Expect lets clients open a volume that is attached elsewhere and is to come
// here, until Unexpect. sizeBytes is its size now.
func (g *Gateway) Expect(name string, sizeBytes uint64, read ReadThrough) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.expected[name] = &arrival{g: g, name: name, size: sizeBytes, read: read}
}

// Unexpect ends Expect. Connections that are open stay as they are.
func (g *Gateway) Unexpect(name string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.expected, name)
}

// ReadAt reads from a volume attached here on behalf of the host it is to go to.
func (g *Gateway) ReadAt(ctx context.Context, name string, off uint64, p []byte) error {
	v, err := g.Volume(name)
	if err != nil {
		return err
	}
	if size := v.Size(); off > size || uint64(len(p)) > size-off {
		return status.Errorf(status.Invalid, "volume %s has %d bytes; %d bytes at %d are not all in it", name, size, len(p), off)
	}
	w := make(waiter, 1)
	v.Submit([]*volume.Op{{Kind: volume.OpRead, Off: off, Len: uint64(len(p)), Data: p, User: w}})
	select {
	case k := <-w:
		return status.New(k, "read of volume "+name+": "+k.String())
	case <-ctx.Done():
		<-w // the engine owns p until then; it answers when the hand-over is over
		return status.Errorf(status.Timeout, "the read of volume %s took too long", name)
	}
}

// open returns what a client of a name gets: the volume if it is attached here,
// else its arrival.
func (g *Gateway) open(name string) (nbdserver.Volume, error) {
	g.mu.Lock()
	v, x := g.volumes[name], g.expected[name]
	g.mu.Unlock()
	if x != nil && (v == nil || v.State() == volume.Ended) {
		return x, nil
	}
	return asExport(g.Volume(name))
}

// arrived returns the volume once it is attached here, else nil.
func (x *arrival) arrived() *Volume {
	if v := x.here.Load(); v != nil {
		return v
	}
	v, err := x.g.Volume(x.name)
	if err != nil || v.State() == volume.Ended {
		return nil
	}
	x.here.Store(v)
	return v
}

// Size implements nbdserver.Volume.
func (x *arrival) Size() uint64 {
	if v := x.arrived(); v != nil {
		return v.Size()
	}
	return x.size
}

// ReadOnly implements nbdserver.Volume: its client is to write later.
func (x *arrival) ReadOnly() bool { return false }

// Extents implements nbdserver.Volume.
func (x *arrival) Extents(off, n uint64) []volume.Extent {
	if v := x.arrived(); v != nil {
		return v.Extents(off, n)
	}
	return []volume.Extent{{Len: n}}
}

// Submit implements nbdserver.Volume.
func (x *arrival) Submit(ops []*volume.Op) {
	if v := x.arrived(); v != nil {
		v.Submit(ops)
		return
	}
	go x.through(append([]*volume.Op(nil), ops...))
}

// through answers operations that come before the volume, one after the other:
// they are few.
func (x *arrival) through(ops []*volume.Op) {
	ctx, cancel := context.WithTimeout(x.g.ctx, arrivalWait)
	defer cancel()
	for _, op := range ops {
		k := status.Permission // a write, before the volume is ours
		switch op.Kind {
		case volume.OpFlush:
			k = status.OK // nothing was written here
		case volume.OpRead:
			k = x.readOne(ctx, op)
		}
		if k == status.OK || x.here.Load() == nil {
			complete([]volume.Done{{Op: op, Status: k}})
		} else {
			x.here.Load().Submit([]*volume.Op{op})
		}
	}
}

// readOne reads through the holder; when that no longer has the volume, it is
// about to come.
func (x *arrival) readOne(ctx context.Context, op *volume.Op) status.Kind {
	if op.States != nil {
		for i := range op.States {
			op.States[i] = volume.BlockData
		}
		return status.OK
	}
	for {
		err := x.read(ctx, op.Off, op.Data)
		if err == nil || x.arrived() != nil {
			return status.Of(err) // an error, and it is here: Submit asks it
		}
		select {
		case <-time.After(handRetry):
		case <-ctx.Done():
			return status.Of(err)
		}
	}
}
