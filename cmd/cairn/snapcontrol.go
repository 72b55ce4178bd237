package main

import (
	"context"
	"time"

	"github.com/cairnstore/cairn/chunk/gateway"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

func cutReply(c *gateway.Cut, err error) *pb.CutReply {
	if err != nil {
		return &pb.CutReply{Status: uint32(status.Of(err)), Detail: err.Error()}
	}
	return &pb.CutReply{VolumeId: uint64(c.Volume), Layer: uint32(c.Layer), SizeBytes: c.Size, Held: c.Held, HeldUs: uint64(c.For.Microseconds())}
}

// PrepareCut implements pb.HostControlServer.
func (c *control) PrepareCut(ctx context.Context, r *pb.CutRequest) (*pb.CutReply, error) {
	return cutReply(&gateway.Cut{}, c.h.gw.PrepareCut(ctx, r.Volume)), nil
}

// HoldCut implements pb.HostControlServer.
func (c *control) HoldCut(ctx context.Context, r *pb.CutRequest) (*pb.CutReply, error) {
	cut, err := c.h.gw.HoldCut(ctx, r.Volume, time.Duration(r.HoldMs)*time.Millisecond)
	return cutReply(cut, err), nil
}

// ReleaseCut implements pb.HostControlServer.
func (c *control) ReleaseCut(ctx context.Context, r *pb.CutRequest) (*pb.CutReply, error) {
	cut, err := c.h.gw.ReleaseCut(ctx, r.Volume)
	return cutReply(cut, err), nil
}

// ReclaimVolume implements pb.HostControlServer.
func (c *control) ReclaimVolume(ctx context.Context, r *pb.VolumeRef) (*pb.HostReply, error) {
	return reply(c.h.gw.Reclaim(ctx, r.Volume)), nil
}

// FlattenVolume implements pb.HostControlServer.
func (c *control) FlattenVolume(ctx context.Context, r *pb.VolumeRef) (*pb.HostReply, error) {
	return reply(c.h.gw.Flatten(ctx, r.Volume)), nil
}

// showSnapshot opens VOLUME@SNAPSHOT here, read-only.
func (c *control) showSnapshot(ctx context.Context, name string) *pb.AttachVolumeReply {
	before := len(c.h.gw.Shown())
	v, err := c.h.gw.Show(ctx, name)
	if err != nil {
		return &pb.AttachVolumeReply{Status: uint32(status.Of(err)), Detail: err.Error()}
	}
	return &pb.AttachVolumeReply{Uri: c.h.uri(v.Name()), Fresh: len(c.h.gw.Shown()) > before}
}
