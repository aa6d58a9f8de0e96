"""The client of fedbasin: a Flower mod that aligns, measures and replies for an existing ClientApp."""

from fedbasin.client.mod import basin as basin
from fedbasin.client.reply_builder import build_reply as build_reply
from fedbasin.client.request_reader import read_request as read_request
