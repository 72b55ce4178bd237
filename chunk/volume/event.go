package volume

import (
	"time"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/proto/wire"
)

// OpKind is what a client wants.
type OpKind uint8

// The operations.
const (
	OpRead OpKind = iota
	OpWrite
	OpZero // read as zeros from now on, to the byte
	OpTrim // whole blocks inside the range may read as zeros
	OpFlush
	OpCopy // whole blocks that a clone shows from its origin become its own
)

// copyBlocks is the unit of OpCopy: if an origin shows any of it, all of it is
// copied.
const copyBlocks = 16

// Op is one client operation. The engine owns it, and Data, until it is in
// Out.Done.
type Op struct {
	Kind OpKind
	FUA  bool   // durable before it is done
	Tail bool   // it looks beyond the limit of a shrink
	Off  uint64 // bytes
	Len  uint64 // bytes
	Data []byte // Write: payload. Read: Len bytes to fill

	// States makes a read say how its blocks are stored instead of what is in
	// them: a byte for each of its whole blocks, BlockData or BlockHole.
	States []byte

	User any // whoever submitted it: a Completer, for the shell

	// Waited is how long the client's request has been with the shell already:
	// it counts in Slow.
	Waited time.Duration

	parts    int           // pieces not finished; > 0 while admitting
	failed   status.Kind   // first failure
	stored   bool          // a store takes part in it, and would refuse an older epoch
	answered bool          // it was in Out.Done: whatever still refers to it is late
	next     *Op           // wait queue
	at       time.Duration // it was submitted
}

// How a block is stored (Op.States).
const (
	BlockData byte = iota // there is data, or there may be
	BlockHole             // it reads as zeros and takes no space
)

// Done is a finished operation.
type Done struct {
	Op     *Op
	Status status.Kind
}

// Completer gets finished operations back: Op.User holds the one that
// submitted them. The shell calls it outside the engine's lock.
type Completer interface{ Complete(ds []Done) }

// Send is one request for one replica, over its connection Gen and no other:
// when Gen is no longer the live one it is to be dropped. The request, and its
// Data, belong to the connection until it is answered or Down.
type Send struct {
	Replica int
	Gen     uint64
	Req     *wire.Request
}

// LinkAction tells the shell to keep a connection to a replica, or not to.
type LinkAction struct {
	Replica int
	Open    bool
}

// MetaCall is a mutation for the metadata service. The shell answers it with
// exactly one MetaDone, which may take as long as it likes.
type MetaCall struct {
	Allocate *pb.Allocate
	Change   *pb.ChangeMembers
	Move     *pb.MoveChunks
	Detach   *pb.Detach
	HandOver *pb.HandOver
	Prune    *pb.PruneLayer
	Look     bool // bring the volume as it is now as a Refresh, and then the answer
}

// Out gathers the actions of steps. The shell carries them out after it has
// released its lock, in any order: sends are independent of each other.
type Out struct {
	Sends  []Send
	Done   []Done
	Meta   []*MetaCall
	Links  []LinkAction
	Cuts   []CutNews
	Listed []Listed
}

// Reset empties o, keeping its memory.
func (o *Out) Reset() {
	clear(o.Sends)
	clear(o.Done)
	clear(o.Cuts)
	clear(o.Listed)
	o.Sends, o.Done, o.Meta, o.Links, o.Cuts, o.Listed = o.Sends[:0], o.Done[:0], o.Meta[:0], o.Links[:0], o.Cuts[:0], o.Listed[:0]
}

// Event is what can happen to an engine.
type Event interface{ event() }

// The events.
type (
	// Submit brings client operations.
	Submit struct{ Ops []*Op }
	// Up says that a connection to a replica is ready; Gen tells it from
	// earlier ones and is above them.
	Up struct {
		Replica int
		Gen     uint64
	}
	// Down says that the connection Gen is gone, with all its answers.
	Down struct {
		Replica int
		Gen     uint64
		Why     string
	}
	// Lost says that a replica could not be reached again over any path.
	Lost struct {
		Replica int
		Why     string
	}
	// Replies brings answers over connection Gen.
	Replies struct {
		Replica int
		Gen     uint64
		Replies []*wire.Reply
	}
	// MetaDone answers a MetaCall.
	MetaDone struct {
		Call   *MetaCall
		Result *pb.Result
		Err    error // status kinds; Unavailable and Unknown are asked again
	}
	// Lease extends the right to serve reads until a moment of the engine's clock.
	Lease struct{ Until time.Duration }
	// Refresh brings the volume as metadata knows it: size, members, and
	// with Whole its chunk map too, read at the same moment.
	Refresh struct {
		Volume *pb.Volume
		Chunks []*pb.Chunk
		Whole  bool
	}
	// Tick lets time pass; at least every 100 ms.
	Tick struct{}
	// Detach asks to drain, flush and let go. With Force it lets go at once, as a
	// gateway's death does: operations without an answer are answered Shutdown, what
	// was acknowledged is with every in-sync member, and the next attach makes them
	// equal and durable.
	Detach struct{ Force bool }
	// Stay gives up a Detach that has not let go yet: the volume serves on.
	Stay struct{}
	// HandOver asks to drain, flush and give the volume to another host's
	// gateway session. With no Host it is given up, if it still can be: the
	// volume then serves on.
	HandOver struct{ Host, Session string }
	// Fence says that the epoch is over.
	Fence struct {
		Why    string
		Fenced bool // another writer has the volume; else this side ends by itself
	}
)

func (*Submit) event()   {}
func (*Up) event()       {}
func (*Down) event()     {}
func (*Lost) event()     {}
func (*Replies) event()  {}
func (*MetaDone) event() {}
func (*Lease) event()    {}
func (*Refresh) event()  {}
func (*Tick) event()     {}
func (*Detach) event()   {}
func (*Stay) event()     {}
func (*HandOver) event() {}
func (*Fence) event()    {}
