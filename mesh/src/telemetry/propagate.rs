//! Trace context across processes, as W3C `traceparent` strings in our own
//! messages. A malformed one is ignored: tracing never fails a request.

use opentelemetry::trace::{
    SpanContext, SpanId, TraceContextExt as _, TraceFlags, TraceId, TraceState,
};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// The `traceparent` of `span`, which says whether it is sampled, too, so that whoever
/// is called next does not draw anew. Empty where no collector is configured.
pub fn traceparent(span: &Span) -> String {
    let Some(context) = context_of(span) else { return String::new() };
    let (trace, span, flags) = (context.trace_id(), context.span_id(), context.trace_flags());
    format!("00-{trace}-{span}-{:02x}", (flags & TraceFlags::SAMPLED).to_u8())
}

/// A collector is configured and gets this span.
pub fn is_sampled(span: &Span) -> bool {
    context_of(span).is_some_and(|context| context.is_sampled())
}

fn context_of(span: &Span) -> Option<SpanContext> {
    if span.is_disabled() {
        return None;
    }
    let context = span.context().span().span_context().clone();
    context.is_valid().then_some(context)
}

/// Makes `span` a child of the span that `traceparent` names, if it names one.
pub fn set_parent(span: &Span, traceparent: &str) {
    if let Some(parent) = parse(traceparent).filter(|_| !span.is_disabled()) {
        let context = opentelemetry::Context::new().with_remote_span_context(parent);
        // Fails only when the span was already entered under another parent.
        let _ = span.set_parent(context);
    }
}

fn parse(text: &str) -> Option<SpanContext> {
    let mut parts = text.split('-');
    let (version, trace, span, flags) =
        (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let hex = |s: &str, n: usize| s.len() == n && s.bytes().all(|b| b.is_ascii_hexdigit());
    if version != "00" || !hex(trace, 32) || !hex(span, 16) || !hex(flags, 2) {
        return None;
    }
    let flags = u8::from_str_radix(flags, 16).ok()?;
    let context = SpanContext::new(
        TraceId::from_hex(trace).ok()?,
        SpanId::from_hex(span).ok()?,
        TraceFlags::new(flags & 1),
        true,
        TraceState::default(),
    );
    context.is_valid().then_some(context)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_well_formed_parents_are_taken() {
        let sound = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert!(parse(sound).is_some_and(|c| c.is_sampled()));
        for bad in [
            "",
            "00-0-0-01",
            "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b716920333g-01",
        ] {
            assert!(parse(bad).is_none(), "{bad}");
        }
    }
}
