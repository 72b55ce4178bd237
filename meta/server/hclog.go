package server

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"slices"

	"github.com/hashicorp/go-hclog"
)

// sink passes raft's log lines on to slog. What raft calls an error is mostly a
// peer that does not answer: a warning here.
type sink struct{ log *slog.Logger }

var _ hclog.SinkAdapter = sink{}

// raftLogger returns the logger raft wants.
func raftLogger(log *slog.Logger) hclog.Logger {
	l := hclog.NewInterceptLogger(&hclog.LoggerOptions{Name: "raft", Level: hclog.Info, Output: io.Discard})
	l.RegisterSink(sink{log})
	return l
}

// Accept implements hclog.SinkAdapter.
func (s sink) Accept(_ string, level hclog.Level, msg string, args ...any) {
	to := slog.LevelDebug
	switch level {
	case hclog.Warn, hclog.Error:
		to = slog.LevelWarn
	case hclog.Info:
		to = slog.LevelInfo
	}
	s.log.Log(context.Background(), to, "raft: "+msg, readable(args)...)
}

// readable gives raft's keys and values names that a line of ours does not have
// yet, and makes text of what is to be formatted.
func readable(args []any) []any {
	out := make([]any, len(args))
	for i, a := range args {
		switch a := a.(type) {
		case hclog.Format:
			if format, is := a[0].(string); is {
				out[i] = fmt.Sprintf(format, a[1:]...)
			}
		case string:
			out[i] = a
			if i%2 == 0 && slices.Contains([]string{slog.TimeKey, slog.LevelKey, slog.MessageKey, "node"}, a) {
				out[i] = "raft-" + a
			}
		default:
			out[i] = a
		}
	}
	return out
}
