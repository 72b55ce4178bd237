package gateway

import (
	"time"

	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/proto/pb"
)

// Heat: what is read and written of which chunk, counted when operations come
// in, decayed and told to metadata with every few heartbeats. Placement goes by
// it; nothing else does, and losing it costs a VM a move at most.

// Bounds of one report.
const (
	heatEvery   = 10 * time.Second
	heatChunks  = 1024     // hottest of each volume
	heatVolumes = 4096     // chunks of all volumes of a host
	usedBytes   = 64 << 10 // of all volumes' bits of used chunks
)

// count notes the operations of a client. Chunks are counted by where an
// operation begins: few lie across a border.
func (v *Volume) count(ops []*volume.Op) {
	for _, op := range ops {
		if op.Kind == volume.OpWrite || op.Kind == volume.OpRead && op.States == nil {
			if op.Off < v.Size() {
				v.heat.Count(uint32(op.Off/v.chunkBytes), op.Len, op.Kind == volume.OpWrite)
			}
		}
	}
}

// heatReport is what a heartbeat tells now; nil between reports.
func (g *Gateway) heatReport(at time.Duration) (out []*pb.VolumeHeat) {
	if at < g.heatTold+heatEvery {
		return nil
	}
	g.heatTold = at
	vs, left := g.Volumes(), usedBytes
	for _, v := range vs {
		hot, used := v.heat.Hottest(at, min(heatChunks, heatVolumes/len(vs)))
		r := &pb.VolumeHeat{VolumeId: uint64(v.id)}
		if r.Said = len(used) <= left; r.Said {
			r.Used, left = used, left-len(used)
		}
		for _, h := range hot {
			r.Chunks = append(r.Chunks, &pb.ChunkHeat{Index: h.Chunk, Read: float32(h.Read), Write: float32(h.Write)})
		}
		out = append(out, r)
	}
	return out
}
