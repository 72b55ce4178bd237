package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/cairnstore/cairn/proto/ids"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// DiffVolume implements pb.HostControlServer.
func (c *control) DiffVolume(r *pb.DiffRequest, to grpc.ServerStreamingServer[pb.DiffReply]) error {
	err := c.h.gw.Diff(to.Context(), r.Volume, r.From, r.To, func(ranges []*pb.Range) error {
		return to.Send(&pb.DiffReply{Ranges: ranges})
	})
	if err != nil {
		return to.Send(&pb.DiffReply{Status: uint32(status.Of(err)), Detail: err.Error()})
	}
	return nil
}

// diff lists what differs between two snapshots of a volume, in order.
func (s *session) diff(ctx context.Context, r *pb.DiffRequest, each func(*pb.Range) error) error {
	return s.whileAttached(ctx, r.Volume, func(host string) error {
		h, err := s.host(ctx, host)
		if err != nil {
			return err
		}
		conn, err := grpc.NewClient("passthrough:///"+h.ControlAddr, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return err
		}
		return errors.Join(readDiff(ctx, conn, h, r, each), conn.Close())
	})
}

func readDiff(ctx context.Context, conn *grpc.ClientConn, h *pb.Host, r *pb.DiffRequest, each func(*pb.Range) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := pb.NewHostControlClient(conn).DiffVolume(ctx, r)
	for err == nil {
		var rep *pb.DiffReply
		if rep, err = stream.Recv(); err != nil {
			break
		}
		if err := status.New(status.Kind(rep.Status), rep.Detail); err != nil {
			return err
		}
		for _, x := range rep.Ranges {
			if err := each(x); err != nil {
				return err
			}
		}
	}
	switch {
	case errors.Is(err, io.EOF):
		return nil
	case status.Of(err) == status.Unavailable:
		return status.Errorf(status.Unavailable, "host %s at %s does not answer: is it up?", h.Name, h.ControlAddr)
	}
	return err
}

// host finds a host by name.
func (s *session) host(ctx context.Context, name string) (*pb.Host, error) {
	hosts, err := s.hosts(ctx)
	if err != nil {
		return nil, err
	}
	for _, h := range hosts {
		if h.Host.Name == name {
			return h.Host, nil
		}
	}
	return nil, status.Errorf(status.NotFound, "there is no host %q: `cairn host ls` lists them", name)
}

// diffView is a difference as `-o json` shows it.
type diffView struct {
	Volume    string      `json:"volume"`
	From      string      `json:"from"` // snapshot; "": everything
	To        string      `json:"to"`   // snapshot; "": the volume as it is now
	FromBytes uint64      `json:"fromSizeBytes"`
	ToBytes   uint64      `json:"toSizeBytes"`
	Changed   uint64      `json:"changedBytes"` // of all ranges
	Ranges    []rangeView `json:"ranges"`
}

type rangeView struct {
	Offset uint64 `json:"offset"`
	Length uint64 `json:"length"`
	Zero   bool   `json:"zero"` // reads as zeros now
}

func volumeDiff(c *cli) *cobra.Command {
	var out outputFlag
	cmd := &cobra.Command{
		Use: "diff VOLUME@SNAPSHOT [VOLUME@SNAPSHOT|VOLUME]", Short: "List what differs between two snapshots, or a snapshot and the volume", Args: cobra.RangeArgs(1, 2),
		Long: `List the ranges of bytes that were written between two snapshots of a volume, or since a
snapshot. With one snapshot, or a volume, alone: everything it holds. It is known from the
layers; no data is read. A block written with what it had counts.`,
		Example: "  cairn volume diff db@monday db@tuesday\n  cairn volume diff db@monday db -o json\n  cairn volume diff db@monday",
		RunE: func(cmd *cobra.Command, args []string) error {
			v := diffView{Ranges: []rangeView{}}
			v.Volume, v.To = splitSnapshot(args[len(args)-1])
			if len(args) == 2 {
				of, from, err := wantSnapshot(args[0])
				if err != nil {
					return err
				}
				if v.From = from; of != v.Volume {
					return usagef("%s and %s are of different volumes: only snapshots of one volume can be compared", args[0], args[1])
				}
			}
			return c.with(cmd.Context(), imageWait, func(ctx context.Context, s *session) error { return s.showDiff(ctx, &v, &out) })
		},
	}
	out.register(cmd)
	return cmd
}

func (s *session) showDiff(ctx context.Context, v *diffView, out *outputFlag) error {
	of, err := s.volume(ctx, v.Volume)
	if err != nil {
		return err
	}
	v.ToBytes = of.SizeBytes
	for _, l := range of.Layers {
		if l.State != pb.LayerState_LAYER_STATE_SNAPSHOT {
			continue
		}
		if l.Name == v.From {
			v.FromBytes = l.SizeBytes
		}
		if l.Name == v.To {
			v.ToBytes = l.SizeBytes
		}
	}
	var rows [][]string
	err = s.diff(ctx, &pb.DiffRequest{Volume: v.Volume, From: v.From, To: v.To}, func(r *pb.Range) error {
		v.Ranges = append(v.Ranges, rangeView{r.Offset, r.Length, r.Zero})
		v.Changed += r.Length
		what := "data"
		if r.Zero {
			what = "zeros"
		}
		rows = append(rows, []string{fmt.Sprint(r.Offset), fmt.Sprint(r.Length), what})
		return nil
	})
	if err != nil {
		return err
	}
	if v.From != "" && v.FromBytes != v.ToBytes {
		say("the size went from %d to %d bytes", v.FromBytes, v.ToBytes)
	}
	say("%s in %d ranges", formatSize(v.Changed), len(v.Ranges))
	return out.show(v, []string{"OFFSET", "LENGTH", "NOW"}, rows)
}

// mapView is a volume's chunk as `-o json` shows it.
type mapView struct {
	Offset uint64    `json:"offset"`
	Length uint64    `json:"length"`
	Chunk  uint64    `json:"chunk"`
	State  string    `json:"state"` // live, or allocated: nothing is acknowledged in it yet
	Copies []mapCopy `json:"copies"`
}

type mapCopy struct {
	Host     string `json:"host"`
	Store    string `json:"store"`
	InSync   bool   `json:"inSync"`
	Filling  bool   `json:"filling"`            // being made: does not count yet
	Replaces string `json:"replaces,omitempty"` // the store whose place it takes
}

func volumeMap(c *cli) *cobra.Command {
	var out outputFlag
	cmd := &cobra.Command{
		Use: "map NAME", Short: "Show which ranges of a volume are allocated, and where each chunk lies", Args: cobra.ExactArgs(1),
		Long: `Show which ranges of a volume are allocated, and on which stores each chunk lies. What is
not listed has no chunk: it reads as zeros, or as a clone's origin.`,
		Example: "  cairn volume map db\n  cairn volume map db -o json",
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.with(cmd.Context(), cliWait, func(ctx context.Context, s *session) error {
				rep, err := s.meta.Query(ctx, &pb.QueryRequest{Q: &pb.QueryRequest_Volume{Volume: args[0]}, WithChunks: true})
				if err != nil {
					return err
				}
				if len(rep.Volumes) != 1 {
					return status.Errorf(status.NotFound, "there is no volume %q: `cairn volume ls` lists them", args[0])
				}
				views, rows := mapOf(rep.Volumes[0], rep.Chunks)
				return out.show(views, []string{"OFFSET", "LENGTH", "CHUNK", "STATE", "COPIES"}, rows)
			})
		},
	}
	out.register(cmd)
	return cmd
}

func mapOf(v *pb.Volume, chunks []*pb.Chunk) (views []mapView, rows [][]string) {
	views = []mapView{}
	members := map[string]*pb.Member{}
	for _, m := range v.Members {
		members[string(m.Store)] = m
	}
	short := func(b []byte) string {
		id, err := ids.StoreIDFromBytes(b)
		if err != nil {
			return "?"
		}
		return id.Short()
	}
	for _, c := range chunks {
		off := uint64(c.Index) * v.ChunkBytes
		w := mapView{Offset: off, Length: min(v.ChunkBytes, v.SizeBytes-min(off, v.SizeBytes)), Chunk: c.Id, State: "live", Copies: []mapCopy{}}
		if c.State == pb.ChunkState_CHUNK_STATE_ALLOCATED {
			w.State = "allocated"
		}
		var at []string
		add := func(store []byte, filling bool, replaces []byte) {
			m := members[string(store)]
			cp := mapCopy{Host: m.GetHost(), Store: short(store), InSync: m.GetInSync() && !filling, Filling: filling}
			text := cp.Host + "/" + cp.Store
			if len(replaces) > 0 {
				cp.Replaces = short(replaces)
			}
			switch {
			case filling:
				text += " (being made)"
			case !cp.InSync:
				text += " (out of sync)"
			}
			w.Copies, at = append(w.Copies, cp), append(at, text)
		}
		for _, s := range c.Stores {
			add(s, false, nil)
		}
		for _, f := range c.Filling {
			add(f.Store, true, f.Replaces)
		}
		views = append(views, w)
		rows = append(rows, []string{fmt.Sprint(w.Offset), formatSize(w.Length), fmt.Sprint(w.Chunk), w.State, strings.Join(at, ", ")})
	}
	return views, rows
}
